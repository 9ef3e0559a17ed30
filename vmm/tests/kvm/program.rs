//! Programs for the guest that no shell can stand in for.

/// Where a program is loaded, and the bytes before its code.
const BASE: u64 = 0x40_0000;
const HEADERS_BYTES: u64 = 64 + 56;

/// A static ELF that writes `word` to the 32-bit `port` and exits with 0.
///
/// No shell can: /dev/port writes single bytes, and a report is one write of four.
pub(crate) fn port_writer(port: u16, word: u32) -> Vec<u8> {
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
    elf(&code)
}

/// A static ELF that says that `device` is a 16450 at `port` which raises no interrupt, as
/// setserial(8) would, and exits with 0 if the kernel agrees. The sample calls itself a 16550, but
/// takes a FIFO that is full for an empty one; a 16450 has none.
pub(crate) fn serial_setter(device: &str, port: u16) -> Vec<u8> {
    const TIOCSSERIAL: u32 = 0x541f;
    const PORT_16450: u32 = 2;
    const CODE_BYTES: usize = 46;
    let data_start = u32::try_from(BASE + HEADERS_BYTES).unwrap() + CODE_BYTES as u32;
    // struct serial_struct of linux/serial.h: type, line, port, interrupt, flags, FIFO, divisor,
    // base of rates, two delays of which the second is none, nothing else.
    let mut data = Vec::new();
    for word in [PORT_16450, 0, port.into(), 0, 0, 1, 0, 115_200, 50, 0, 0xffff] {
        data.extend(word.to_le_bytes());
    }
    data.resize(72, 0);
    let name_start = data_start + 72;
    data.extend(device.bytes().chain([0]));

    let mut code = Vec::new();
    code.push(0xbf); // mov edi, name
    code.extend(name_start.to_le_bytes());
    code.extend([0xbe, 2, 8, 0, 0]); // mov esi, O_RDWR | O_NONBLOCK
    code.extend([0xb8, 2, 0, 0, 0]); // mov eax, SYS_open
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0x89, 0xc7]); // mov edi, eax
    code.push(0xbe); // mov esi, TIOCSSERIAL
    code.extend(TIOCSSERIAL.to_le_bytes());
    code.push(0xba); // mov edx, data
    code.extend(data_start.to_le_bytes());
    code.extend([0xb8, 16, 0, 0, 0]); // mov eax, SYS_ioctl
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xf7, 0xd8, 0x97]); // neg eax; xchg edi, eax
    code.extend([0xb8, 60, 0, 0, 0]); // mov eax, SYS_exit
    code.extend([0x0f, 0x05]); // syscall
    assert_eq!(code.len(), CODE_BYTES);
    code.extend(data);
    elf(&code)
}

fn elf(code: &[u8]) -> Vec<u8> {
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
