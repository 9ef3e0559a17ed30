//! How the program is linked.

fn main() {
    // A worker fills in 40,000 addresses as it starts. Packed, what it reads for that is a
    // ninetieth (generic ABI, "Relative Relocation Table"; since glibc 2.36).
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    println!("cargo:rerun-if-changed=build.rs");
}
