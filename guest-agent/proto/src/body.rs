//! Bodies of frames, field by field.
//!
//! Numbers are little-endian. A text or a piece of bytes is a u32 with its length and then itself,
//! a list a u32 with its length and then its items. Whatever is read here came from the other
//! side: a length is believed only as far as there are bytes.

/// A body being written.
#[derive(Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

/// A body being read: what is left of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl Writer {
    pub(crate) fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub(crate) fn flag(self, value: bool) -> Self {
        self.u8(value.into())
    }

    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn i64(mut self, value: i64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn text(self, text: &str) -> Self {
        let mut writer = self.count(text.len());
        writer.0.extend_from_slice(text.as_bytes());
        writer
    }

    pub(crate) fn texts<'a>(self, texts: impl ExactSizeIterator<Item = &'a str>) -> Self {
        let writer = self.count(texts.len());
        texts.fold(writer, Self::text)
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }

    /// A length. One that no frame could hold is written as one that no frame holds.
    fn count(self, count: usize) -> Self {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX))
    }
}

impl<'a> Reader<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    pub(crate) fn flag(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_le_bytes)
    }

    /// A text, which is UTF-8.
    pub(crate) fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_owned()).ok()
    }

    /// A text as UTF-8, whatever it was: names in a guest are bytes, and clients speak JSON.
    pub(crate) fn lossy(&mut self) -> Option<String> {
        Some(String::from_utf8_lossy(self.bytes()?).into_owned())
    }

    pub(crate) fn texts(&mut self) -> Option<Vec<String>> {
        let count = self.u32()?;
        // No room is made on the word of the other side.
        let mut texts = Vec::new();
        for _ in 0..count {
            texts.push(self.text()?);
        }
        Some(texts)
    }

    /// Nothing, if nothing is left.
    pub(crate) fn end(self) -> Option<()> {
        self.0.is_empty().then_some(())
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let count = usize::try_from(self.u32()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_in_order_and_nothing_is_left() {
        let body = Writer::default()
            .u8(1)
            .flag(true)
            .u16(2)
            .u32(3)
            .u64(4)
            .i64(-5)
            .text("six")
            .texts(["a", ""].into_iter())
            .finish();

        let mut reader = Reader::new(&body);

        assert_eq!((reader.u8(), reader.flag(), reader.u16()), (Some(1), Some(true), Some(2)));
        assert_eq!((reader.u32(), reader.u64(), reader.i64()), (Some(3), Some(4), Some(-5)));
        assert_eq!(reader.text().as_deref(), Some("six"));
        assert_eq!(reader.texts(), Some(vec!["a".to_owned(), String::new()]));
        assert_eq!(reader.end(), Some(()));
    }

    #[test]
    fn a_length_is_believed_as_far_as_there_are_bytes() {
        let lie = Writer::default().u32(u32::MAX).u32(1).finish();

        assert_eq!(Reader::new(&lie).text(), None);
        assert_eq!(Reader::new(&lie).texts(), None);
        assert_eq!(Reader::new(&[1, 0, 0, 0, 0xff]).text(), None);
        assert_eq!(Reader::new(&[1, 0, 0, 0, 0xff]).lossy().as_deref(), Some("\u{fffd}"));
        assert_eq!(Reader::new(&[2]).flag(), None);
        assert_eq!(Reader::new(&[2]).end(), None);
    }
}
