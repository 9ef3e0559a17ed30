#!/host/busybox sh
# PID 1 of the emulated host. First in the initramfs: loads modules, makes the outer machine's file
# system, under a writable layer, the root. Then, from /run/in-host in that root: runs the job with
# its streams on virtio ports, reports, and powers off. PID 1 never returns.
bb=/host/busybox
if [ "$1" != root ]; then
    $bb mkdir -p /proc /sys /dev /outer /layer /root
    $bb mount -t proc proc /proc
    $bb mount -t sysfs sys /sys
    $bb mount -t devtmpfs dev /dev
    exec > /dev/console 2>&1
    while read -r module arguments; do
        $bb insmod "/host/modules/$module.ko" $arguments
    done < /host/modules/order
    $bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro outer /outer
    $bb mount -t tmpfs -o mode=755,size=90% layer /layer
    $bb mkdir /layer/upper /layer/work
    $bb mount -t overlay -o lowerdir=/outer,upperdir=/layer/upper,workdir=/layer/work outer /root
    for dir in proc sys dev run tmp var/lib/ovum; do $bb mkdir -p /root/$dir; done
    for dir in proc sys dev; do $bb mount --move /$dir /root/$dir; done
    $bb mount -t tmpfs -o mode=755 run /root/run
    $bb mount -t tmpfs -o mode=1777,size=90% tmp /root/tmp
    $bb cp -r /host /job /root/run/
    exec $bb switch_root /root /run/host/busybox sh /run/host/init root
fi

bb=/run/host/busybox
$bb mkdir -p /dev/pts /dev/shm
$bb mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
$bb mount -t tmpfs -o mode=1777 shm /dev/shm
$bb mount -t debugfs debug /sys/kernel/debug
$bb mount -t cgroup2 cgroup /sys/fs/cgroup
$bb sed 's/[^ ]*/+&/g' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control
$bb ln -sf /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do $bb ln -sf "/proc/self/fd/${n%:*}" "/dev/${n#*:}"; done
$bb mount -t ext4 /dev/vda /var/lib/ovum
$bb hostname ovum-host
$bb ip link set lo up
$bb ip addr add 10.0.2.15/24 dev eth0
$bb ip link set eth0 up
$bb ip route add default via 10.0.2.2
echo 1 > /proc/sys/net/ipv4/ip_forward

# Streams go through pipes, since a port can be opened only once.
until ports=$(echo /dev/vport*p4) && [ -c "$ports" ]; do $bb usleep 1000; done
ports=${ports%4}
exec 9> "${ports}4"
$bb mkfifo /run/host/in /run/host/out /run/host/err
$bb cat < /run/host/out > "${ports}1" & out=$!
$bb cat < /run/host/err > "${ports}2" & err=$!
$bb cat "${ports}3" > /run/host/in &
echo started >&9
$bb setsid /bin/sh /run/job < /run/host/in > /run/host/out 2> /run/host/err 9>&- &
wait $!
status=$?
# What the command left running would hold its streams open for ever.
for pid in $(cd /proc && echo [0-9]*); do
    case $pid in 1 | "$out" | "$err") ;; *) kill -9 "$pid" ;; esac
done 2> /dev/null
wait $out $err
# The outside takes what is on its way before it believes that this is the end.
sent() { $bb sed -n 's/^bytes_sent: *//p' "/sys/kernel/debug/virtio-ports/${ports#/dev/}$1"; }
echo "exited $status $(sent 1) $(sent 2)" >&9
while :; do $bb sleep 1000; done
