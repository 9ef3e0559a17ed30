//! What a boot loader promises a kernel, read back from guest memory.

use std::io::Write;

use super::*;

const RAM_BYTES: u64 = 64 << 20;
const ENTRY: u64 = 16 << 20;

fn mem() -> Mem {
    Mem::from_ranges(&[(GuestAddress(0), usize::try_from(RAM_BYTES).unwrap())]).unwrap()
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

/// The least ELF that is a kernel: one segment of `memory_bytes` at [`ENTRY`], which holds "ovum".
fn kernel(memory_bytes: u64) -> File {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let (executable, amd64, version) = (2_u16, 62_u16, 1_u32);
    elf.extend(executable.to_le_bytes());
    elf.extend(amd64.to_le_bytes());
    elf.extend(version.to_le_bytes());
    let (headers_start, sections_start, flags) = (64_u64, 0_u64, 0_u32);
    for word in [ENTRY, headers_start, sections_start] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(flags.to_le_bytes());
    let (elf_header, program_header, program_headers) = (64_u16, 56_u16, 1_u16);
    for half_word in [elf_header, program_header, program_headers, 64, 0, 0] {
        elf.extend(half_word.to_le_bytes());
    }
    let (load, all_rights) = (1_u32, 7_u32);
    elf.extend(load.to_le_bytes());
    elf.extend(all_rights.to_le_bytes());
    for word in [120, ENTRY, ENTRY, 4, memory_bytes, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(b"ovum");
    file(&elf)
}

fn read<T: vm_memory::ByteValued>(mem: &Mem, address: u64) -> T {
    mem.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn kernel_and_archives_are_where_the_parameters_say() {
    let mem = mem();
    let mut archives = [file(b"first"), file(b""), file(b"second!")];

    let entry =
        load(&mem, &mut Image::new(&mut kernel(4096), None), &mut archives, "quiet").unwrap();

    assert_eq!(entry, ENTRY);
    assert_eq!(read::<[u8; 4]>(&mem, ENTRY), *b"ovum");
    assert_eq!(read::<[u8; 6]>(&mem, CMDLINE_START), *b"quiet\0");
    let parameters: boot_params = read(&mem, ZERO_PAGE_START);
    let header = parameters.hdr;
    let (start, bytes) = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!((u64::from(start), bytes), (RAM_BYTES - 4096, 15));
    assert_eq!(&read::<[u8; 16]>(&mem, start.into()), b"first\0\0\0second!\0");
    let ram: Vec<_> = parameters.e820_table[..usize::from(parameters.e820_entries)]
        .iter()
        .map(|entry| (entry.addr, entry.size, entry.r#type))
        .collect();
    assert_eq!(ram, [(0, 0x9_fc00, 1), (1 << 20, RAM_BYTES - (1 << 20), 1)]);
}

#[test]
fn a_kernel_needs_no_initramfs() {
    let mem = mem();

    load(&mem, &mut Image::new(&mut kernel(4096), None), &mut [], "").unwrap();

    let header = read::<boot_params>(&mem, ZERO_PAGE_START).hdr;
    assert_eq!({ header.ramdisk_size }, 0);
}

#[test]
fn the_command_line_is_printable_and_at_most_2047_bytes() {
    let mem = mem();
    let longest = "a".repeat(2047);
    load(&mem, &mut Image::new(&mut kernel(4096), None), &mut [], &longest).unwrap();
    assert_eq!(read::<u8>(&mem, CMDLINE_START + 2046), b'a');
    assert_eq!(read::<u8>(&mem, CMDLINE_START + 2047), 0);

    let error = load(&mem, &mut Image::new(&mut kernel(4096), None), &mut [], &"a".repeat(2048))
        .unwrap_err();
    assert!(matches!(error, BootError::CmdlineTooLong { bytes: 2048 }), "{error}");
    for cmdline in ["a\0b", "a\nb", "a\tb", "\u{e4}", "\u{7f}"] {
        let error =
            load(&mem, &mut Image::new(&mut kernel(4096), None), &mut [], cmdline).unwrap_err();
        assert!(matches!(error, BootError::CmdlineNotAscii), "{cmdline:?}: {error}");
    }
}

#[test]
fn an_initramfs_ends_above_the_kernel_or_is_too_large() {
    let mem = mem();
    let room = RAM_BYTES - ENTRY - 4096;
    let sparse = |bytes| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file
    };
    load(&mem, &mut Image::new(&mut kernel(4096), None), &mut [sparse(room)], "").unwrap();

    for too_large in [room + 1, RAM_BYTES, RAM_BYTES + 1, 1 << 40] {
        let mut archives = [sparse(too_large)];
        let error =
            load(&mem, &mut Image::new(&mut kernel(4096), None), &mut archives, "").unwrap_err();
        assert!(
            matches!(error, BootError::InitramfsTooLarge { ram_end: RAM_BYTES, .. }),
            "{too_large}: {error}"
        );
    }
    let error = load(
        &mem,
        &mut Image::new(&mut kernel(4096), None),
        &mut [sparse(room), file(b"one more")],
        "",
    )
    .unwrap_err();
    assert!(matches!(error, BootError::InitramfsTooLarge { .. }), "{error}");
}

#[test]
fn what_is_no_kernel_is_refused() {
    let mem = mem();
    let mut cut_off = vec![0; 64];
    cut_off[..4].copy_from_slice(b"\x7fELF");
    for content in [&b""[..], b"MZ", b"#!/bin/sh\n", &cut_off] {
        let error = load(&mem, &mut Image::new(&mut file(content), None), &mut [], "").unwrap_err();
        assert!(matches!(error, BootError::Kernel(_)), "{error}");
    }
}

#[test]
fn a_kernel_larger_than_memory_leaves_no_room() {
    let mem = mem();
    let error =
        load(&mem, &mut Image::new(&mut kernel(RAM_BYTES), None), &mut [file(b"archive")], "")
            .unwrap_err();
    assert!(matches!(error, BootError::InitramfsTooLarge { .. }), "{error}");
}
