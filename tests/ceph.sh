#!/bin/bash
# Starts a real S3 server on loopback: one Ceph monitor, one OSD that keeps everything in memory, and radosgw.
#   tests/ceph.sh EMPTY_DIR S3_PORT MON_PORT
# Returns once it answers. Keys: local / local-only. To stop it, end the processes in EMPTY_DIR/*.pid.
# Needs the Debian packages radosgw, ceph-mon, ceph-osd and uuid-runtime; takes about 12 s.
set -euo pipefail

if [ $# -ne 3 ]; then
    echo "usage: $0 EMPTY_DIR S3_PORT MON_PORT" >&2
    exit 2
fi
dir=$(realpath -m "$1")
s3_port=$2
mon_port=$3
mkdir -p "$dir"/{mon,osd,rgw,log}
cd "$dir"
export CEPH_CONF=$dir/ceph.conf

# Pool sizes of 1 and few placement groups: one OSD must be enough, and each group costs time at the start.
cat > ceph.conf <<CONF
[global]
fsid = $(uuidgen)
mon_host = [v1:127.0.0.1:$mon_port]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = $dir/keyring
run_dir = $dir
pid_file = $dir/\$name.pid
admin_socket = $dir/\$name.asok
log_file = $dir/log/\$name.log
auth_allow_insecure_global_id_reclaim = true
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
# Run as whoever starts it, not as the user ceph.
setuser_match_path =
[mon]
mon_data = $dir/mon
mon_warn_on_insecure_global_id_reclaim_allowed = false
mon_data_avail_crit = 1
[osd]
osd_data = $dir/osd
osd_objectstore = memstore
memstore_device_bytes = 1073741824
osd_memory_target = 939524096
osd_op_num_shards = 2
[client.rgw]
rgw_data = $dir/rgw
rgw_frontends = beast endpoint=127.0.0.1:$s3_port
rgw_thread_pool_size = 32
rgw_dns_name = 127.0.0.1
CONF

{
    ceph-authtool --create-keyring keyring -g -n mon. --cap mon 'allow *'
    ceph-authtool keyring -g -n client.admin --cap mon 'allow *' --cap osd 'allow *'
    ceph-authtool keyring -g -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
    ceph-authtool keyring -g -n client.rgw --cap mon 'allow rw' --cap osd 'allow rwx'
    monmaptool --create --addv a "[v1:127.0.0.1:$mon_port]" --fsid "$(sed -n 's/^fsid = //p' ceph.conf)" monmap
    ceph-mon -i a --mkfs --monmap monmap --keyring keyring
    ceph-mon -i a
    osd_uuid=$(uuidgen)
    timeout 30 ceph osd new "$osd_uuid"
    ceph-osd -i 0 --mkfs --osd-uuid "$osd_uuid"
    timeout 30 ceph osd crush add osd.0 1.0 root=default
    ceph-osd -i 0
    timeout 60 radosgw -n client.rgw
} > log/start.log 2>&1 || { cat log/start.log >&2; exit 1; }

for _ in $(seq 200); do
    if (exec 3<> "/dev/tcp/127.0.0.1/$s3_port") 2> /dev/null; then
        radosgw-admin user create --uid=local --display-name=local \
            --access-key=local --secret-key=local-only > /dev/null 2>> log/start.log
        exit 0
    fi
    sleep 0.2
done
echo "radosgw did not answer on port $s3_port" >&2
tail -20 log/*.log >&2
exit 1
