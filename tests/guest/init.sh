#!/bin/busybox sh
# The guest's first process: runs the scenario that the host has chosen, says how that ended, and
# switches the machine off. NAME=value on the kernel's command line is a variable here.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
stty -echo

# A line that the host may wait for.
say() { echo "GUEST: $*"; }

for module in /modules/*.ko; do insmod "$module"; done
# shellcheck source=/dev/null
(set -e; . "/$SCENARIO")
say "exit $?"
poweroff -f
