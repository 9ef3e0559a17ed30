//! The smallest image that a server takes from an archive: one file, which no guest could run.

use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, Header};

/// The image `tiny:latest` in an archive, as `docker save` makes them.
pub fn tiny_archive() -> Vec<u8> {
    let layer = tar_of(&[("bin/tiny", b"#!tiny")]);
    let digest: String = Sha256::digest(&layer).iter().map(|byte| format!("{byte:02x}")).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/bin/tiny"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    let manifest = json!([{
        "Config": "config.json", "RepoTags": ["tiny:latest"], "Layers": ["layer.tar"],
    }]);
    tar_of(&[
        ("config.json", config.to_string().as_bytes()),
        ("layer.tar", &layer),
        ("manifest.json", manifest.to_string().as_bytes()),
    ])
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = Header::new_ustar();
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, path, *content).expect("memory takes it");
    }
    archive.into_inner().expect("memory takes it")
}
