# Keeps an ext4 on the disk busy. The host says what to do next, a word a line:
#   round   overwrite every file with the next round's content, and sync
#   begin   write in the background without pause, syncing only some of it
#   halt    end that
#   end     leave everything as it is: the machine goes off with the disk mounted
# shellcheck shell=sh

# By its path: the shell has a mke2fs of its own.
/bin/mke2fs -q -t ext4 /dev/vda
# With many commits, and write-back at once: while anything is dirty, the disk is busy.
mount -t ext4 -o commit=1 /dev/vda /mnt
echo 1 > /proc/sys/vm/dirty_writeback_centisecs
echo 1 > /proc/sys/vm/dirty_expire_centisecs

write_round() {
    for file in 0 1 2 3 4 5; do
        # In place, so that a backup under way has to save what is there.
        yes "round $1 file $file" | dd of=/mnt/file$file bs=64k count=16 iflag=fullblock \
            conv=notrunc status=none
    done
    # The blocks of the last one are discarded. A backup under way has to save them all the same.
    rm -f /mnt/gone*
    yes "round $1" | dd of="/mnt/gone$1" bs=64k count=16 iflag=fullblock status=none
    # Nobody overwrites this, so it is what a slow backup has still to copy after all the rest.
    dd if=/dev/zero of="/mnt/alone$1" bs=1M count=8 status=none
    echo "$1" > /mnt/ROUND
    (cd /mnt && sha256sum ROUND file* gone* > SUMS)
    sync
    fstrim /mnt
    say "synced round $1 $(sha256sum < /mnt/SUMS)"
}

# Files that come, grow, change their names and go, all without a sync.
write_unsynced() {
    while [ ! -e /tmp/halt ]; do
        yes "unsynced" | head -c 700000 > /mnt/unsynced/new
        mv /mnt/unsynced/new /mnt/unsynced/old
        head -c 300000 /mnt/unsynced/old >> /mnt/unsynced/log
        [ "$(stat -c %s /mnt/unsynced/log)" -lt 3000000 ] || rm /mnt/unsynced/log
    done
}

# Files that are on the disk, with their checksums, once the host has been told.
write_kept() {
    number=0
    # On a fast machine they would fill the disk.
    while [ $number -lt 200 ] && [ ! -e /tmp/halt ]; do
        name=kept$number
        yes "$name" | dd of=/mnt/$name bs=32k count=2 iflag=fullblock conv=fsync status=none
        (cd /mnt && sha256sum $name) | dd of=/mnt/$name.sum conv=fsync status=none
        say "kept $number"
        number=$((number + 1))
    done
}

round=0
say "ready"
while read -r word; do
    case $word in
        round)
            write_round $round
            round=$((round + 1))
            ;;
        begin)
            mkdir /mnt/unsynced
            write_unsynced &
            unsynced=$!
            write_kept &
            kept=$!
            ;;
        halt)
            touch /tmp/halt
            wait "$unsynced"
            wait "$kept"
            say "halted"
            ;;
        end) break ;;
    esac
done
