# A daemon and those who write through it, on an ext4, until the power goes. PLACE: where to mount
# it; PYTHON: the interpreter, which finds its way by variables of its own.
# shellcheck shell=sh

mount -t sysfs sys /sys
mkdir -p "$PLACE"
mount -t ext4 -o commit=1 /dev/vda "$PLACE"
say "mounted"
"$PYTHON" -m tests.powercut.guest /dev/vda "$PLACE" || cat /tmp/blockd.log
