//! Archives that tools write, checked against the `tar` crate's writer, and archives no tool would.

use proptest::collection::vec;
use proptest::prelude::any;

use super::*;
use crate::tar::testing::{TarBuilder, header};

fn entries(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut reader = TarReader::new(archive);
    let mut found = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut body = Vec::new();
        reader.read_to_end(&mut body)?;
        found.push((entry, body));
    }
    Ok(found)
}

fn malformed(archive: &[u8]) -> &'static str {
    match entries(archive) {
        Err(TarError::Malformed { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_another_writer_wrote_is_read() {
    let long = "d/".repeat(120) + "name";
    let mut builder = tar::Builder::new(Vec::new());
    let mut head = tar::Header::new_gnu();
    head.set_size(5);
    head.set_mode(0o4755);
    head.set_uid(3_000_000);
    head.set_gid(7);
    head.set_mtime(1_700_000_000);
    head.set_entry_type(tar::EntryType::Regular);
    builder.append_data(&mut head, &long, &b"hello"[..]).unwrap();
    let mut head = tar::Header::new_gnu();
    head.set_entry_type(tar::EntryType::Symlink);
    head.set_size(0);
    builder.append_link(&mut head, "link", &long).unwrap();
    let archive = builder.into_inner().unwrap();

    let found = entries(&archive).unwrap();

    let (file, body) = &found[0];
    assert_eq!(body, b"hello");
    assert_eq!(file.path, long.as_bytes());
    assert_eq!((file.kind, file.mode), (EntryKind::File, 0o4755));
    assert_eq!((file.uid, file.gid, file.mtime_s), (3_000_000, 7, 1_700_000_000));
    let (link, _) = &found[1];
    assert_eq!((link.kind, link.link.as_slice()), (EntryKind::Symlink, long.as_bytes()));
    assert_eq!(found.len(), 2);
}

#[test]
fn pax_records_override_the_header() {
    let archive = TarBuilder::new()
        .pax("path", b"new\nline/\xff")
        .pax("uid", b"4294967294")
        .pax("mtime", b"-1.25")
        .pax("SCHILY.xattr.user.a", b"\n=\0")
        .file("short", "x")
        .file("after", "y")
        .build();

    let found = entries(&archive).unwrap();

    let entry = &found[0].0;
    assert_eq!(entry.path, b"new\nline/\xff");
    assert_eq!(entry.uid, 4_294_967_294);
    assert_eq!((entry.mtime_s, entry.mtime_ns), (-2, 750_000_000));
    assert_eq!(entry.xattrs, [(b"user.a".to_vec(), b"\n=\0".to_vec())]);
    assert_eq!(found[1].0.path, b"after");
    assert_eq!(found[1].0.xattrs, []);
}

#[test]
fn a_pax_size_is_the_size() {
    let archive = TarBuilder::new()
        .pax("size", b"3")
        .entry(b'0', b"f", b"", b"", (0, 0))
        .raw_body(b"abc")
        .file("g", "d")
        .build();

    let found = entries(&archive).unwrap();

    assert_eq!(found[0].1, b"abc");
    assert_eq!(found[1].1, b"d");
}

#[test]
fn links_and_devices_have_no_body_whatever_their_size_says() {
    let with = TarBuilder::new();
    let archive = TarBuilder::new()
        .file("f", "x")
        .raw(&header(b'1', b"l", b"f", 9999, &with, (0, 0)))
        .raw(&header(b'3', b"c", b"", 77, &with, (5, 1)))
        .file("g", "y")
        .build();

    let found = entries(&archive).unwrap();

    assert_eq!(found.len(), 4);
    assert_eq!((found[1].0.kind, found[1].0.size_bytes), (EntryKind::HardLink, 0));
    assert_eq!((found[2].0.kind, found[2].0.device), (EntryKind::CharDevice, (5, 1)));
}

#[test]
fn an_old_directory_is_a_file_with_a_slash() {
    let archive = TarBuilder::new().entry(0, b"d/", b"", b"", (0, 0)).build();

    assert_eq!(entries(&archive).unwrap()[0].0.kind, EntryKind::Directory);
}

#[test]
fn the_prefix_of_a_posix_header_counts_and_that_of_a_gnu_header_does_not() {
    let mut posix = header(b'0', b"name", b"", 0, &TarBuilder::new(), (0, 0));
    posix[345..348].copy_from_slice(b"dir");
    let mut gnu = posix;
    gnu[257..265].copy_from_slice(b"ustar  \0");
    for block in [&mut posix, &mut gnu] {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }

    let path = |block: &[u8]| entries(block).unwrap()[0].0.path.clone();

    assert_eq!(path(&posix), b"dir/name");
    assert_eq!(path(&gnu), b"name");
}

#[test]
fn an_end_is_zeros_or_nothing() {
    assert_eq!(entries(b"").unwrap().len(), 0);
    assert_eq!(entries(&[0; 512]).unwrap().len(), 0);
    assert_eq!(entries(&TarBuilder::new().file("a", "b").unfinished()).unwrap().len(), 1);
    let early = TarBuilder::new().raw(&[0; 1024]).file("a", "b").build();
    assert_eq!(entries(&early).unwrap().len(), 0);
}

#[test]
fn an_archive_that_ends_early_is_an_error() {
    let archive = TarBuilder::new().file("a", "x".repeat(1000)).unfinished();

    for length in [1, 511, 513, 1000, 1511] {
        let result = entries(&archive[..length]);
        assert!(
            matches!(&result, Err(TarError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof),
            "{length}: {result:?}"
        );
    }
}

#[test]
fn rubbish_is_refused() {
    let good = TarBuilder::new().file("a", "b").build();
    let mut flipped = good.clone();
    flipped[3] ^= 1;

    assert_eq!(malformed(&flipped), "a header's checksum is wrong");
    assert!(entries(&[b'x'; 2048]).is_err());
    let dangling = TarBuilder::new().raw(&header(b'x', b"", b"", 0, &TarBuilder::new(), (0, 0)));
    assert_eq!(malformed(&dangling.build()), "it ends where an entry was announced");
    let nul = TarBuilder::new().pax("path", b"a\0b").file("x", "");
    assert_eq!(malformed(&nul.build()), "a name has a NUL byte");
    let too_big = header(b'0', b"f", b"", u64::MAX, &TarBuilder::new(), (0, 0));
    assert_eq!(malformed(&too_big), "a number is too big");
}

/// A header may claim any size for what describes an entry; memory must not follow.
#[test]
fn an_endless_extended_header_is_refused_before_it_is_read() {
    for kind in [b'x', b'g', b'L', b'K'] {
        let head = header(kind, b"", b"", 1 << 40, &TarBuilder::new(), (0, 0));

        assert_eq!(malformed(&head), "an entry's extended header is over 1 MiB");
    }
}

#[test]
fn sparse_files_and_volumes_are_refused_by_name() {
    let unsupported = |archive: Vec<u8>| match entries(&archive) {
        Err(TarError::Unsupported { path, what }) => (path, what),
        other => panic!("{other:?}"),
    };
    let sparse = ("f".to_owned(), "a sparse file");
    let of_kind = |kind| TarBuilder::new().entry(kind, b"f", b"", b"", (0, 0)).build();

    assert_eq!(unsupported(of_kind(b'S')), sparse);
    assert_eq!(
        unsupported(TarBuilder::new().pax("GNU.sparse.major", b"1").file("f", "").build()),
        sparse
    );
    assert_eq!(unsupported(of_kind(b'M')).1, "part of a multi-volume archive");
    assert_eq!(unsupported(of_kind(b'?')).1, "of an unknown type");
}

proptest::proptest! {
    /// Whatever the bytes, the reader ends and does not panic.
    #[test]
    fn no_bytes_break_the_reader(
        mut bytes in vec(0_u8.., 0..2048),
        kind in 0_u8..,
        fix in any::<bool>(),
    ) {
        if fix && bytes.len() >= 512 {
            bytes[156] = kind;
            bytes[148..156].fill(b' ');
            let sum: u32 = bytes[..512].iter().map(|&byte| u32::from(byte)).sum();
            bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let _ = entries(&bytes);
    }

    /// Mutated archives either read or fail, and bodies never exceed the archive.
    #[test]
    fn no_mutation_breaks_the_reader(offset in 0_usize..3072, byte in 0_u8..) {
        let mut archive = TarBuilder::new()
            .pax("SCHILY.xattr.user.a", b"value")
            .file("name", "body".repeat(20))
            .symlink("s", "t")
            .build();
        let offset = offset % archive.len();
        archive[offset] = byte;
        if let Ok(found) = entries(&archive) {
            let bodies: usize = found.iter().map(|(_, body)| body.len()).sum();
            proptest::prop_assert!(bodies <= archive.len());
        }
    }
}
