#!/host/busybox sh
# PID 1 of the emulated host; it never returns. First, in the initramfs: all that is the same for
# every run. Then it asks for a job: the moment that is saved and resumed. Last, with the outer
# machine's file system under a writable layer as root: the job, its streams on virtio ports.
if [ "$1" != root ]; then
    /host/busybox mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    exec > /dev/console 2>&1
    while read -r module arguments; do
        insmod "/host/modules/$module.ko" $arguments
    done < /host/modules/order
    mkdir /dev/pts /dev/shm
    mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs -o mode=1777 shm /dev/shm
    mount -t debugfs debug /sys/kernel/debug
    mount -t cgroup2 cgroup /sys/fs/cgroup
    sed 's/[^ ]*/+&/g' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control
    ln -s /proc/self/fd /dev/fd
    for n in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${n%:*}" "/dev/${n#*:}"; done
    mount -t tmpfs -o mode=755,size=90% layer /layer
    mount -t tmpfs -o mode=755 run /run
    mount -t tmpfs -o mode=1777,size=90% tmp /tmp
    mkdir /layer/upper /layer/work /run/host
    cp /host/busybox /host/init /run/host/
    mkfifo /run/host/in /run/host/out /run/host/err
    hostname ovum-host
    ip link set lo up
    ip addr add 10.0.2.15/24 dev eth0
    ip link set eth0 up
    ip route add default via 10.0.2.2
    echo 1 > /proc/sys/net/ipv4/ip_forward

    until port=$(echo /dev/vport*p5) && [ -c "$port" ]; do usleep 1000; done
    echo ready > "${port%5}4"
    cat "$port" > /run/host/job
    read -r now disk folder < /run/host/job
    date -s "@${now#\#}" > /dev/null
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro outer /outer
    mount -t overlay -o lowerdir=/outer,upperdir=/layer/upper,workdir=/layer/work outer /root
    cd /root && mkdir -p proc sys dev run tmp var/lib/ovum
    mount -t "$disk" /dev/vda var/lib/ovum
    # A checkout under /tmp is seen there although this host has a /tmp of its own.
    case $folder in /tmp/*) mkdir -p "$folder" && mount --bind "/root$folder" "$folder" ;; esac
    # The shell finds its own applets through /proc, so that goes last.
    for dir in sys dev run tmp proc; do mount --move /$dir $dir; done
    exec /host/busybox switch_root . /run/host/busybox sh /run/host/init root "${port%5}"
fi

cd /run/host
exec 9> "${2}4"
# Streams go through pipes, since a port can be opened only once.
cat < out > "${2}1" & out=$!
cat < err > "${2}2" & err=$!
cat "${2}3" > in &
cat "${2}6" > /dev/null &
ulimit -Hn 1048576
echo started >&9
setsid /bin/sh job < in > out 2> err 9>&- &
wait $!
status=$?
# What the command left running would hold its streams open for ever.
for pid in $(cd /proc && echo [0-9]*); do
    case $pid in 1 | "$out" | "$err") ;; *) kill -9 "$pid" ;; esac
done 2> /dev/null
wait $out $err
# The outside takes what is on its way before it believes that this is the end.
sent() { sed -n 's/^bytes_sent: *//p' "/sys/kernel/debug/virtio-ports/$1"; }
echo "exited $status $(sent "${2##*/}1") $(sent "${2##*/}2")" >&9
while :; do sleep 1000; done
