//! HTTP/2 by hand: what a client library would not send.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// A connection that sends any bytes. Answers are read and thrown away, except after
/// [`Raw::unread`].
pub struct Raw {
    writer: OwnedWriteHalf,
    unread: Option<OwnedReadHalf>,
    _reading: JoinSet<()>,
    path: String,
    metadata: Vec<(String, String)>,
}

impl Raw {
    /// Speaks first: the preface and the settings, `(id, value)`.
    pub async fn connect(address: SocketAddr, path: &str, settings: &[(u16, u32)]) -> Raw {
        let mut raw = Raw::unread(address, path, settings).await;
        let mut reader = raw.unread.take().expect("nothing reads yet");
        raw._reading.spawn(async move {
            let mut buffer = [0; 16 * 1024];
            while reader.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
        });
        raw
    }

    /// The same, and reads nothing.
    pub async fn unread(address: SocketAddr, path: &str, settings: &[(u16, u32)]) -> Raw {
        let stream = TcpStream::connect(address).await.expect("a connection");
        Raw::over(stream, path, settings).await
    }

    /// The same, and its kernel takes next to nothing of what is not read.
    pub async fn deaf(address: SocketAddr, path: &str, settings: &[(u16, u32)]) -> Raw {
        let socket = TcpSocket::new_v4().expect("a connection");
        socket.set_recv_buffer_size(4096).expect("a connection");
        let stream = socket.connect(address).await.expect("a connection");
        Raw::over(stream, path, settings).await
    }

    async fn over(stream: TcpStream, path: &str, settings: &[(u16, u32)]) -> Raw {
        let (reader, writer) = stream.into_split();
        let mut raw = Raw {
            writer,
            unread: Some(reader),
            _reading: JoinSet::new(),
            path: path.to_owned(),
            metadata: Vec::new(),
        };
        let mut payload = Vec::new();
        for (id, value) in settings {
            payload.extend(id.to_be_bytes());
            payload.extend(value.to_be_bytes());
        }
        let mut first = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        first.extend(frame(SETTINGS, 0, 0, &payload));
        raw.say(&first).await;
        raw
    }

    /// The same with one more line of metadata in each call.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Raw {
        self.metadata.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Whether it could be said: the other side may have ended the connection.
    pub async fn say(&mut self, bytes: &[u8]) -> bool {
        self.writer.write_all(bytes).await.is_ok()
    }

    /// A call's headers; its message is to come.
    pub fn call(&self, stream: u32) -> Vec<u8> {
        block(stream, &self.headers())
    }

    /// A call whose message is compressed, or is said to be.
    pub fn compressed(&self, stream: u32, message: &[u8]) -> Vec<u8> {
        let mut block = self.headers();
        block.push(0);
        text(&mut block, "grpc-encoding");
        text(&mut block, "gzip");
        let mut data = vec![1];
        data.extend((message.len() as u32).to_be_bytes());
        data.extend(message);
        let mut bytes = self::block(stream, &block);
        bytes.extend(frame(DATA, END_STREAM, stream, &data));
        bytes
    }

    pub fn headers(&self) -> Vec<u8> {
        // HPACK, RFC 7541: POST and http are in the static table, the rest are literals that are
        // not indexed
        let mut block = vec![0x83, 0x86];
        literal(&mut block, 4, &self.path);
        literal(&mut block, 1, "localhost");
        for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")] {
            block.push(0);
            text(&mut block, name);
            text(&mut block, value);
        }
        for (name, value) in &self.metadata {
            block.push(0);
            text(&mut block, name);
            text(&mut block, value);
        }
        block
    }

    /// A whole call with this message.
    pub fn whole(&self, stream: u32, message: &[u8]) -> Vec<u8> {
        let mut data = vec![0];
        data.extend((message.len() as u32).to_be_bytes());
        data.extend(message);
        let mut bytes = self.call(stream);
        bytes.extend(frame(DATA, END_STREAM, stream, &data));
        bytes
    }
}

/// The ids of a client's streams.
pub fn streams(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|number| 2 * number + 1)
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A block of headers, in as many frames as it takes.
pub fn block(stream: u32, headers: &[u8]) -> Vec<u8> {
    let pieces = headers.chunks(16 * 1024);
    let last = pieces.len().saturating_sub(1);
    let frames = pieces.enumerate().map(|(number, piece)| {
        let kind = if number == 0 { HEADERS } else { CONTINUATION };
        let flags = if number == last { END_HEADERS } else { 0 };
        frame(kind, flags, stream, piece)
    });
    frames.flatten().collect()
}

fn literal(block: &mut Vec<u8>, name: u8, value: &str) {
    block.push(name);
    text(block, value);
}

/// A string of HPACK that is not compressed: its length, RFC 7541, 5.1, and itself.
fn text(block: &mut Vec<u8>, text: &str) {
    const IN_PREFIX: usize = 127;
    match text.len().checked_sub(IN_PREFIX) {
        None => block.push(text.len() as u8),
        Some(mut rest) => {
            block.push(IN_PREFIX as u8);
            while rest > IN_PREFIX {
                block.push((rest & IN_PREFIX) as u8 | 128);
                rest >>= 7;
            }
            block.push(rest as u8);
        }
    }
    block.extend(text.as_bytes());
}
