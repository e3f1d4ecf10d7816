# Looks at an ext4 that was last seen mounted. KEPT: how many kept files must be there.
# shellcheck shell=sh

mount -t ext4 /dev/vda /mnt
umount /mnt
dmesg | grep 'EXT4-fs (vda): recovery complete'
/bin/e2fsck -f -n /dev/vda
mount -t ext4 -o ro /dev/vda /mnt
cd /mnt || exit
sha256sum -c SUMS
number=0
while [ $number -lt "$KEPT" ]; do
    sha256sum -c kept$number.sum
    number=$((number + 1))
done
say "found round $(cat ROUND) $(sha256sum < SUMS)"
