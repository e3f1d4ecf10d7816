"""Every bound of the daemon, in one place: what a client, a disk or a job can make it hold.

Sizes in bytes, times in seconds.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# --- dirty bitmaps ---------------------------------------------------------------------------

#: Recent writes a node keeps before it folds them into its bitmaps: large enough that folding is
#: cheap for each write, small enough that one fold stays far below the loop's 20 ms.
RECENT_WRITES_LIMIT = 1024
#: Bytes in a bitmap's name (QEMU's limit).
BITMAP_NAME_BYTES = 1023
#: A granule: a sector at the least, and what QEMU's 32-bit field can hold at the most.
BITMAP_GRANULARITY_MIN_BYTES = 512
BITMAP_GRANULARITY_MAX_BYTES = 2 * GIB
#: The granularity of a bitmap for which none is asked: the node's cluster size within these.
BITMAP_DEFAULT_GRANULARITY_MIN_BYTES = 4 * KIB
BITMAP_DEFAULT_GRANULARITY_MAX_BYTES = 64 * KIB
#: Granules looked at in one step when listing dirty extents (8 GiB by 64 KiB): some 10 us of work
#: where little is dirty, 6 ms where every other granule is. A power of two, 64 at the least.
BITMAP_WINDOW_GRANULES = 128 * KIB

#: Granules in one piece of a stored bitmap (64 GiB by 64 KiB): at most 128 KiB, which takes 0.4 ms
#: to make, and large enough that reading back hundreds of MiB is not slowed down by their number.
#: Part of the format.
BITMAP_PIECE_GRANULES = 1024 * KIB

# --- files and devices -----------------------------------------------------------------------

#: Worker threads a file may keep busy: enough to fill a disk's queue, each with its own stack.
FILE_THREADS = 16
#: With a write of this size or more it is worth a microsecond to know whether it had to wait.
INLINE_WRITE_LARGE_BYTES = 64 * KIB
#: A buffered write inline that takes longer than this means that the kernel made it wait …
INLINE_WRITE_SLOW_NS = 3_000_000
#: … and for this long the file's writes go to a thread before one is tried inline again; it
#: doubles each time that happens again soon.
INLINE_WRITE_PAUSE_MIN_NS = 10_000_000
INLINE_WRITE_PAUSE_MAX_NS = 640_000_000
#: O_DIRECT goes through scratch memory of at most this size for each thread.
DIRECT_SCRATCH_BYTES = 1 * MIB
#: Runs that one question for a file's allocation may give.
ALLOCATION_RUNS_LIMIT = 1024

# --- the state directory ---------------------------------------------------------------------

#: What is armed at a time: so much around a write may come back dirty after a power cut. A disk
#: of 16 TiB has a million of them.
STATE_REGION_BYTES = 16 * MIB
#: One epoch's marks of an image, in memory and in a file: 16 TiB by 64 KiB. Larger images, and
#: finer bitmaps, have coarser marks.
STATE_MARKS_BYTES = 32 * MIB
#: Granules that are marked at once: a write to the page cache of at most 64 KiB.
STATE_MARK_STEP_GRANULES = 512 * KIB
#: Pieces that go into one commit, and pieces of no more use that are deleted in one: a guest
#: write that needs a region armed may have to wait for such a commit.
STATE_BATCH_BYTES = 1 * MIB
STATE_BATCH_PIECES = 1024
STATE_DELETE_PIECES = 16
#: What the database's log is cut to when its content is in the database. It is moved there after
#: each 4 MiB, but for transactions that are larger, and while the disk is full.
STATE_LOG_BYTES = 8 * MIB
#: How many pages of the database's file, of 4 KiB, are given back at once where bitmaps were
#: removed (10 ms, for which guest writes that need a region armed wait), how often while there are
#: more (a GiB in half an hour), and how often this is looked for.
STATE_SHORTEN_PAGES = 128
STATE_SHORTEN_SECONDS = 1
STATE_SHORTEN_LOOK_SECONDS = 60
#: Pieces that are read at once (8 MiB): guest writes that need a region armed wait 20 ms for that.
STATE_READ_PIECES = 64
#: How often what was written to is stored exactly, so that regions at rest are disarmed; and what
#: share of the time that may take.
STATE_CHECKPOINT_SECONDS = 60
STATE_CHECKPOINT_SHARE = 0.1
#: Epochs whose marks files may be there at once: a command stores the bitmaps that it changed, and
#: the others need the marks that they have not been stored with yet. Where they can't be stored by
#: then, a crash leaves them all dirty, and no marks are kept.
STATE_EPOCHS = 8
#: How often storing is tried again while it fails.
STATE_RETRY_SECONDS = 10
#: How long the answer to a command waits until what it did is stored: commits on a healthy disk
#: are far below, and a sick one must not hold up the client.
STATE_KEEP_SECONDS = 15
#: And then, until it is durable that a crash leaves all dirty.
STATE_POISON_SECONDS = 5
#: How often the clock is noted while images are open, and how much later than the last such note
#: an image may have changed by our own writes.
STATE_HEARTBEAT_SECONDS = 1
STATE_HEARTBEAT_LATE_SECONDS = 2
#: How often that note is made durable; and how much later than it our own writes may be, as a
#: power cut leaves both. Between them there must be time for a slow disk.
STATE_HEARTBEAT_SYNC_SECONDS = 10
STATE_HEARTBEAT_CUT_SECONDS = 30

# --- qcow2 -----------------------------------------------------------------------------------

#: The largest tables of an image, as QEMU bounds them: each is held in memory as a whole.
QCOW2_L1_TABLE_BYTES = 32 * MIB
QCOW2_REFCOUNT_TABLE_BYTES = 8 * MIB
QCOW2_SNAPSHOTS = 65536
#: Bitmaps in one image, and the bytes of the directory that describes them.
QCOW2_BITMAPS = 65535
QCOW2_BITMAP_DIRECTORY_BYTES = 1024 * QCOW2_BITMAPS
#: What the bits of one of them may take in the image.
QCOW2_BITMAP_BYTES = 512 * MIB
#: The table of one bitmap, which names the clusters that hold its bits.
QCOW2_BITMAP_TABLE_BYTES = 64 * MIB
#: Images of a backing chain that are opened by the names in them: no fewer than ``NODE_LEVELS``.
QCOW2_CHAIN_IMAGES = 120
#: L2 tables and refcount blocks in memory: as QEMU's default, enough for 256 GiB of a disk by
#: 64 KiB clusters; each kind has at least a few, however large they are.
QCOW2_L2_CACHE_BYTES = 32 * MIB
QCOW2_REFCOUNT_CACHE_BYTES = 8 * MIB
QCOW2_CACHE_TABLES_MIN = 8
#: Changed tables are written back once they are this share of those that fit.
QCOW2_DIRTY_SHARE = 0.5
#: The file grows in such steps, so that growth does not hold up every write; the end that stays
#: unused is a hole, and cut off when the image is closed.
QCOW2_GROWTH_BYTES = 64 * MIB
#: Reads and writes of an image's file up to this size are tried inline: 50 us of copying, about
#: what a hop to a thread costs.
QCOW2_INLINE_BYTES = 256 * KIB
#: File systems give back room in blocks of this size. Less than one is not discarded: that costs a
#: hop to a thread, for each of some thousand clusters of 512 bytes at times, and gains nothing.
QCOW2_DISCARD_BYTES = 4 * KIB
#: Runs of freed clusters that wait for the next write-back, before it is made for them.
QCOW2_FREED_RUNS = 65536
#: Clusters that one write allocates at once; also how much it may put together in memory.
QCOW2_ALLOCATION_BYTES = 2 * MIB
#: How long the request that finds an image corrupt may take to mark it so; its guest waits.
QCOW2_MARK_CORRUPT_SECONDS = 5
#: Clusters that one question for an image's allocation looks at: a few ms of work.
QCOW2_ALLOCATION_CLUSTERS = 32 * KIB

# --- NBD -------------------------------------------------------------------------------------

#: The largest payload of a request or reply; advertised as the maximum block size.
NBD_PAYLOAD_BYTES = 32 * MIB
#: A connection that does something has one buffer for requests and one for replies. So many of
#: them are kept for the next; seldom more than one is in use at once.
NBD_BURSTS_KEPT = 16
NBD_RECEIVE_BUFFER_BYTES = 512 * KIB
NBD_SEND_BUFFER_BYTES = 1 * MIB + KIB
#: With less room than this behind the unread bytes, they are moved to the buffer's front.
NBD_RECEIVE_ROOM_BYTES = 192 * KIB
#: The rest of a larger write's payload is waited for where it stays, in the middle of a burst.
NBD_GATHER_BYTES = 64 * KIB
#: Replies are sent once there is no room for the next one in this: they leave while they are in
#: the processor's cache. A larger one, up to what the buffer holds, is sent alone.
NBD_SEND_BYTES = 256 * KIB + KIB
#: Larger writes are taken in such pieces. A power of two; at least QEMU's default clusters.
NBD_STREAM_BYTES = 256 * KIB
#: Reads that the buffer for replies does not hold are made in pieces of this size.
NBD_READ_PIECE_BYTES = 1 * MIB
#: What a Unix socket is asked to hold for its client: some replies of the usual large size. By
#: default it has no room for a single one, and each is sent in parts with a wait for each.
NBD_SOCKET_SEND_BYTES = 2 * MIB
#: Zeroes read in pieces of this size are sent as holes, to those who understand that.
NBD_HOLE_BYTES = 64 * KIB
#: Runs in a block status, as many as QEMU has; the memory that they may take; and how often the
#: node is asked for more of them, however few it tells each time.
NBD_STATUS_RUNS = 128 * KIB
NBD_STATUS_BYTES = 4 * MIB
NBD_STATUS_STEPS = 4096
#: Requests of one connection that run in tasks, and the bytes they may hold together (a single
#: request of any size may always run).
NBD_REQUESTS_IN_FLIGHT = 64
NBD_BYTES_IN_FLIGHT = 64 * MIB
#: The same of all connections together, but that each may have one as large as the largest of
#: Linux guests (1280 KiB) and of qemu-img (2 MiB): they must not depend on others.
NBD_SERVER_BYTES_IN_FLIGHT = 512 * MIB
NBD_PRESSING_BYTES = 2 * MIB
#: A client that takes nothing of its replies for so long is dropped. Guests that are paused take
#: theirs; only a stopped or dead process does not.
NBD_UNREAD_SECONDS = 120
#: How long one connection may keep the loop before the others get their turn: when no other
#: connection has anything to do, and when one has.
NBD_SLICE_SECONDS = 0.001
NBD_SHARED_SLICE_SECONDS = 0.00025
#: Requests run in one go; so many cached reads take less than that.
NBD_BURST_REQUESTS = 512
#: Attempts to receive before a connection waits through the event loop (about 50 µs).
NBD_SPINS_MAX = 128
#: A wait through the event loop that ends sooner than this could have been a spin.
NBD_SHORT_WAIT_SECONDS = 0.0002
#: Encrypted bytes that all connections receive into, one after the other, and what one of them
#: encrypts at once. OpenSSL keeps as much memory for each connection that has had so much.
NBD_TLS_RECEIVE_BYTES = 64 * KIB
NBD_TLS_SEND_BYTES = 64 * KIB
#: A client that has not come through its handshake by then is dropped.
NBD_HANDSHAKE_SECONDS = 10
#: Connections an NBD server takes when it is not told otherwise.
NBD_CONNECTIONS = 100

# --- NBD client ------------------------------------------------------------------------------

#: Replies received at once.
NBD_CLIENT_BUFFER_BYTES = 256 * KIB
#: Memory for data that nobody wants any more.
NBD_CLIENT_WASTE_BYTES = 64 * KIB
#: A block status, or another reply without data: room for QEMU's longest, and some.
NBD_CLIENT_CHUNK_BYTES = 2 * MIB
#: The largest minimum block that a server may ask for (proto.md, "Block size constraints").
NBD_CLIENT_BLOCK_BYTES = 64 * KIB
#: Requests in flight to one server, and what one attempt to connect, and a good-bye, may take.
NBD_CLIENT_REQUESTS = 64
NBD_CLIENT_CONNECT_SECONDS = 10
NBD_CLIENT_DISCONNECT_SECONDS = 1
#: How long a change that was cancelled may take before its connection is given up: a healthy
#: server has replied by then, and a dead one must not hold up a job's end.
NBD_CLIENT_CHANGE_SECONDS = 10
#: The pause before the next attempt to connect; it doubles from the first to the last.
NBD_CLIENT_PAUSE_MIN_SECONDS = 0.25
NBD_CLIENT_PAUSE_MAX_SECONDS = 4

# --- NBD handshake ---------------------------------------------------------------------------

#: The longest string NBD knows (proto.md, "Conventions"): export names, descriptions, messages.
NBD_STRING_BYTES = 4096
#: So much of an unknown export's name is repeated to the client, as in QEMU.
NBD_NAME_SHOWN_BYTES = 80
#: Data of one option held in memory: room for a longest name and any sensible list after it.
NBD_OPTION_DATA_BYTES = 64 * KIB
#: Longer data is read and thrown away, so that the client gets an answer and not a dead
#: connection, but only up to here; QEMU has the same bound.
NBD_OPTION_DRAIN_BYTES = 32 * MIB
#: Options a client may send before it must have chosen an export. Listing clients ask about each
#: export twice (``qemu-nbd --list``), so this allows for 2000 exports.
NBD_OPTIONS_LIMIT = 4096

# --- nodes -----------------------------------------------------------------------------------

#: A node's size: the largest that QEMU takes, 2 ** 63 rounded down to its largest alignment, so
#: that an offset can be aligned upward within 63 bits.
NODE_BYTES = (1 << 63) - GIB
#: Nodes on top of each other. A request goes through all of them, by some five calls in each, and
#: Python takes a thousand calls inside each other.
NODE_LEVELS = 120
#: Bytes in a node's name (QEMU's limit).
NODE_NAME_BYTES = 31

# --- objects ---------------------------------------------------------------------------------

#: A secret's file: far more than any password or key.
SECRET_BYTES = 1 * MIB
#: A file with rules for who may come in: some thousands of names.
AUTHZ_FILE_BYTES = 1 * MIB

# --- sockets ---------------------------------------------------------------------------------

#: A TCP connection on which nothing has come for so long is asked whether somebody is there, every
#: so often, and given up when so many questions have no answer: after two minutes in all.
KEEP_ALIVE_IDLE_SECONDS = 60
KEEP_ALIVE_INTERVAL_SECONDS = 15
KEEP_ALIVE_QUESTIONS = 4
#: Clients that may wait to be accepted.
LISTEN_BACKLOG = 128
#: How long to wait with the next client when accepting one failed for want of descriptors.
ACCEPT_PAUSE_SECONDS = 0.2
#: How often that is logged, at the most, while it lasts.
ACCEPT_COMPLAINT_SECONDS = 60
#: Bytes received at once during an NBD handshake; less than a connection's buffer, which takes
#: over what came early.
NBD_HANDSHAKE_BYTES = 4 * KIB

# --- jobs ------------------------------------------------------------------------------------

#: What a job's commit, abort and close may each take. They wait for the guest writes in flight,
#: which a sick disk can hold for long, and a daemon that ends waits for them.
JOB_CLEANUP_SECONDS = 30
#: How long the answer to a cancel waits for the job to conclude: an I/O on a healthy target is
#: over by then, and a dead target must not hold up the client.
CANCEL_REPLY_SECONDS = 1

# --- backup ----------------------------------------------------------------------------------

#: The least unit in which a backup copies for any target.
BACKUP_CLUSTER_BYTES = 64 * KIB
#: The most that a user may ask for. One cluster is read at once, and compared with zeroes on the
#: loop (8 ms for so much); each worker has memory for one.
BACKUP_CLUSTER_MAX_BYTES = 16 * MIB
#: Old data that one backup keeps in memory on its way to the target, so that guest writes need
#: not wait for the target; enough for half a second of a target's hiccup at 128 MiB/s.
HELD_BYTES_LIMIT = 64 * MIB
#: Tasks that write held data to the target: enough to fill a queue, small beside the data.
HELD_WRITERS = 8
#: How long one guest write may wait for room for the old data, that is, for a target which takes
#: nothing. After that the backup is given up and the guest goes on.
GUEST_WAIT_FOR_COPY_SECONDS = 10
#: What one copy-before-write filter copies at the same time, each up to ``BACKUP_CHUNK_BYTES``.
CBW_COPIES = 64
#: Old data that may be read inline before one guest write: some 10 µs for each 64 KiB.
INLINE_SAVE_BYTES = 256 * KIB
#: A guest write over at least so many clusters is first asked what in them is a hole.
HOLE_SEARCH_CLUSTERS = 16
#: Tasks that copy in the background, and how much each takes at once.
BACKUP_WORKERS = 4
BACKUP_CHUNK_BYTES = 1 * MIB
#: The same while guests write: larger reads make them wait (p99) longer.
BACKUP_CHUNK_BUSY_BYTES = 256 * KIB
#: What a thread copies in one hop, where it can, and the same while guests write; and the steps in
#: which it does so, which stay in the processor's cache.
BACKUP_SWEEP_BYTES = 8 * MIB
BACKUP_SWEEP_BUSY_BYTES = 1 * MIB
BACKUP_STEP_BYTES = 256 * KIB
#: Guests that have written nothing for so long count as idle.
BACKUP_GUEST_IDLE_SECONDS = 0.1
#: How far ahead the source's allocation is asked for, and the longest run of zeroes that is
#: made at once: a thread may be busy with it for some time, and a cancel waits for it.
BACKUP_MAP_BYTES = 1 * GIB
#: So much is copied before it is discarded on the source, because the target is flushed for it; and
#: so much is discarded at once, because guests that write there wait meanwhile.
BACKUP_DISCARD_BYTES = 64 * MIB
#: Dirty runs that are counted or looked at before others get their turn.
BACKUP_SCAN_RUNS = 4096

#: What an audit of a bitmap reads at once, of the disk and of its backup.
BITMAP_AUDIT_PIECE_BYTES = 1 * MIB

# --- QMP -------------------------------------------------------------------------------------

#: Bytes of one message from a client: far more than any command needs.
QMP_MESSAGE_BYTES = 128 * KIB
#: Arrays and objects inside each other; what checks them uses a few frames for each.
QMP_NESTING_LIMIT = 100
#: Received from a client at once; finding the ends of messages in it takes 10 ms at worst.
QMP_RECEIVE_BYTES = 16 * KIB
#: Replies and events that wait for a client to read them. Above half of it the client's commands
#: wait too; one that leaves more is dropped.
QMP_OUTBOX_BYTES = 16 * MIB
#: How long the daemon's end waits for a client to take its last messages.
QMP_DRAIN_SECONDS = 2
#: What the audit's line shows of a command's arguments and of its error. A long path or a node
#: with all its options fits; the line stays below the 2 KiB that every log takes whole.
AUDIT_ARGUMENTS_CHARACTERS = 1200
AUDIT_ERROR_CHARACTERS = 400

# --- the end ---------------------------------------------------------------------------------

#: How long the daemon's end waits for each of: the command under way, NBD clients, jobs, QMP
#: clients, the state directory; more than one of them takes long only where a disk hangs.
SHUTDOWN_SECONDS = 15
#: How long it waits for all disks together, of which a slow one may have gibibytes to flush.
SHUTDOWN_FLUSH_SECONDS = 300
#: After that the process ends by force; the service has ten minutes.
LAST_RESORT_SECONDS = 400
