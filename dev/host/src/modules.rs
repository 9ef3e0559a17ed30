//! The kernel modules of the emulated host: which, in what order, with what arguments.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Modules asked for; what they depend on is found. One that the kernel has built in is skipped.
///
/// All are loaded before the state is saved that runs start from, so that one more costs a run
/// nothing. `crc32c_generic` comes first: `libcrc32c` needs it and cannot say so in its `depends`.
pub const WANTED: &[(&str, &str)] = &[
    ("crc32c_generic", ""),
    // The machine itself.
    ("virtio_pci", ""),
    ("virtio_blk", ""),
    ("virtio_net", ""),
    ("virtio_console", ""),
    ("virtio_rng", ""),
    ("9pnet_virtio", ""),
    ("9p", ""),
    ("overlay", ""),
    // Virtual machines and what they use of their host.
    ("kvm_amd", "nested=1 npt=1"),
    ("vhost_net", ""),
    ("vhost_vsock", ""),
    ("vsock_loopback", ""),
    ("tun", ""),
    ("macvtap", ""),
    // The emulated IOMMU cannot remap interrupts, so VFIO has to be told to do without.
    ("vfio_iommu_type1", "allow_unsafe_interrupts=1"),
    ("vfio_pci", ""),
    ("mdev", ""),
    ("nvme", ""),
    ("e1000e", ""),
    // File systems and block devices.
    ("ext4", ""),
    ("xfs", ""),
    ("erofs", ""),
    ("squashfs", ""),
    ("loop", ""),
    ("dm_mod", ""),
    // Networks: links, nftables, iptables over nftables, shaping.
    ("bridge", ""),
    ("veth", ""),
    ("dummy", ""),
    ("ifb", ""),
    ("nf_tables", ""),
    ("nft_chain_nat", ""),
    ("nft_ct", ""),
    ("nft_masq", ""),
    ("nft_nat", ""),
    ("nft_redir", ""),
    ("nft_limit", ""),
    ("nft_log", ""),
    ("nft_hash", ""),
    ("nft_reject_inet", ""),
    ("nft_fib_inet", ""),
    ("nft_compat", ""),
    ("nf_conntrack_netlink", ""),
    ("xt_MASQUERADE", ""),
    ("xt_nat", ""),
    ("xt_conntrack", ""),
    ("xt_addrtype", ""),
    ("xt_comment", ""),
    ("xt_mark", ""),
    ("xt_multiport", ""),
    ("xt_tcpudp", ""),
    ("ipt_REJECT", ""),
    ("sch_htb", ""),
    ("sch_tbf", ""),
    ("sch_ingress", ""),
    ("cls_u32", ""),
    ("act_police", ""),
    ("act_mirred", ""),
];

/// The modules of one kernel package.
#[derive(Debug)]
pub struct Modules {
    paths: BTreeMap<String, PathBuf>,
    order: Vec<Module>,
}

/// One module, ready for `insmod`.
#[derive(Debug)]
pub struct Module {
    pub name: String,
    pub arguments: String,
    pub object: Vec<u8>,
}

impl Modules {
    /// Finds [`WANTED`] and all it needs under `root`, dependencies first.
    ///
    /// # Errors
    ///
    /// Says which file could not be read or unpacked.
    pub fn load(root: &Path) -> Result<Vec<Module>> {
        let mut modules = Self { paths: BTreeMap::new(), order: Vec::new() };
        modules.index(root)?;
        for (name, arguments) in WANTED {
            modules.add(name, arguments)?;
        }
        Ok(modules.order)
    }

    fn index(&mut self, directory: &Path) -> Result<()> {
        let entries = fs::read_dir(directory);
        for entry in entries.with_context(|| format!("Failed to list {}", directory.display()))? {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() {
                self.index(&path)?;
            } else if let Some((name, _)) = file_name(&path).split_once(".ko") {
                self.paths.insert(name.replace('-', "_"), path);
            }
        }
        Ok(())
    }

    fn add(&mut self, name: &str, arguments: &str) -> Result<()> {
        if self.order.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(path) = self.paths.get(name) else { return Ok(()) };
        let object = unpack(path)?;
        for dependency in dependencies(&object) {
            self.add(&dependency, "")?;
        }
        self.order.push(Module { name: name.into(), arguments: arguments.into(), object });
        Ok(())
    }
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or("")
}

fn unpack(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("Failed to read {}", path.display()));
    }
    let output = Command::new("xz").arg("-dc").arg(path).output().context("Failed to run xz")?;
    if !output.status.success() {
        bail!("Failed to unpack {}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

/// What a module's `.modinfo` says it depends on. Its strings are zero-terminated, and the build
/// puts `depends=` there once, for every module.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = object[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}
