//! An archive on its way from a client: chunks that arrive in async code, read by blocking code.

use std::io::{self, Read};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

/// Bytes read from the client at once.
pub const CHUNK_BYTES: usize = 256 << 10;

/// Chunks between the client and the reader.
const CHUNKS_MAX: usize = 4;

/// Lets `read` read `stream` on a thread where it may block; returns what that returns.
///
/// Dropped, the stream ends for `read` with an error: a client that goes away is no archive's end.
pub async fn feed<R, T>(mut stream: R, read: impl FnOnce(ChunkReader) -> T + Send + 'static) -> T
where
    R: AsyncRead + Unpin,
    T: Send + 'static,
{
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(CHUNKS_MAX);
    let reader = ChunkReader { receiver, chunk: Bytes::new(), has_ended: false };
    let reading = spawn_blocking(move || read(reader));
    loop {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        // An empty chunk is the end.
        let message = stream.read_buf(&mut chunk).await.map(|_| Bytes::from(chunk));
        let is_last = message.as_ref().map_or(true, Bytes::is_empty);
        // The reader ended: its own result says why.
        if sender.send(message).await.is_err() || is_last {
            break;
        }
    }
    // What comes behind an error is another, or whoever reads on would wait for it for ever.
    drop(sender);
    reading.await.expect("reading an archive does not panic")
}

/// The blocking end of a channel of chunks.
#[derive(Debug)]
pub struct ChunkReader {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    chunk: Bytes,
    has_ended: bool,
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() && !self.has_ended {
            match self.receiver.blocking_recv() {
                Some(chunk) => self.chunk = chunk?,
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
            self.has_ended = self.chunk.is_empty();
        }
        let length = buffer.len().min(self.chunk.len());
        buffer[..length].copy_from_slice(&self.chunk.split_to(length));
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;

    use futures_util::stream;
    use tokio::io::duplex;
    use tokio::sync::oneshot;
    use tokio_util::io::StreamReader;

    use super::*;

    fn to_end(mut reader: ChunkReader) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map(|_| bytes)
    }

    #[tokio::test]
    async fn bytes_come_out_as_they_went_in() {
        let bytes: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();

        let read = feed(bytes.as_slice(), to_end).await.unwrap();

        assert_eq!(read, bytes);
    }

    #[tokio::test]
    async fn whoever_reads_on_behind_an_error_gets_another() {
        let stream = StreamReader::new(stream::iter([Err::<Bytes, _>(io::Error::other("reset"))]));

        let kinds = feed(stream, |mut reader| {
            let mut kind = || reader.read(&mut [0]).unwrap_err().kind();
            [kind(), kind()]
        });

        let told = [io::ErrorKind::Other, io::ErrorKind::ConnectionAborted];
        assert_eq!(kinds.await, told);
    }

    #[tokio::test]
    async fn a_client_that_goes_away_is_no_end() {
        let (_client, server) = duplex(64);
        let (sender, outcome) = oneshot::channel();
        let mut feeding = Box::pin(feed(server, |reader| sender.send(to_end(reader))));
        poll_fn(|context| {
            assert!(pin!(&mut feeding).poll(context).is_pending());
            Poll::Ready(())
        })
        .await;

        drop(feeding);

        let error = outcome.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }
}
