//! Programs for the guest that no shell can stand in for.

/// A static ELF that writes `word` to the 32-bit `port` and exits with 0.
///
/// No shell can: /dev/port writes single bytes, and a report is one write of four.
pub(crate) fn port_writer(port: u16, word: u32) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS_BYTES: u64 = 64 + 56;
    let mut code = Vec::new();
    code.extend([0xbf, 3, 0, 0, 0]); // mov edi, 3
    code.extend([0xb8, 172, 0, 0, 0]); // mov eax, SYS_iopl
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0x66, 0xba]); // mov dx, port
    code.extend(port.to_le_bytes());
    code.push(0xb8); // mov eax, word
    code.extend(word.to_le_bytes());
    code.push(0xef); // out dx, eax
    code.extend([0x31, 0xff]); // xor edi, edi
    code.extend([0xb8, 60, 0, 0, 0]); // mov eax, SYS_exit
    code.extend([0x0f, 0x05]); // syscall
    let bytes = HEADERS_BYTES + code.len() as u64;

    let mut elf = Vec::new();
    elf.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version
    elf.extend((BASE + HEADERS_BYTES).to_le_bytes()); // entry
    elf.extend(64_u64.to_le_bytes()); // program headers
    elf.extend(0_u64.to_le_bytes()); // no sections
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
    for word in [0, BASE, BASE, bytes, bytes, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}
