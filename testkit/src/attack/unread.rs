//! Answers that are not read. The service has a `write_timeout` of one or two seconds.

use std::time::{Duration, Instant};

use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use super::{Attacked, scaled};
use crate::http2::{PING, Raw, WINDOW_UPDATE, frame, streams};

/// Windows that are shut, or let a byte through. `path` with `message` has a long answer.
pub async fn windows(target: &Attacked, path: &str, message: &[u8]) {
    let mut readers = Vec::new();
    for window in [0, 1] {
        for _ in 0..scaled(4) {
            let mut reader = Raw::unread(target.grpc(), path, &[(4, window)]).await;
            for stream in streams(100) {
                let call = reader.whole(stream, message);
                reader.say(&call).await;
            }
            readers.push(reader);
        }
    }
    target.is_alive().await;
    for reader in &mut readers {
        left(reader).await;
    }
}

/// The service has closed its connection, or does so soon.
pub async fn left(reader: &mut Raw) {
    let ping = frame(PING, 0, 0, &[1; 8]);
    let by = Instant::now() + Duration::from_secs(30);
    while reader.say(&ping).await {
        assert!(Instant::now() < by, "the connection goes on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Windows of 2 GiB, and sockets that are not read: the kernel takes some, then HTTP/2 keeps a
/// little of each, and a socket that takes no more is left.
pub async fn sockets(target: &Attacked, path: &str, message: &[u8]) {
    let open = (1_u32 << 31) - 1;
    let mut readers = Vec::new();
    for _ in 0..scaled(4) {
        let mut reader = Raw::deaf(target.grpc(), path, &[(4, open)]).await;
        let wider = frame(WINDOW_UPDATE, 0, 0, &(open - 65_535).to_be_bytes());
        reader.say(&wider).await;
        readers.push(reader);
    }
    let mut sent = 0;
    let by = Instant::now() + Duration::from_secs(90);
    while !readers.is_empty() {
        assert!(Instant::now() < by, "{} connections go on", readers.len());
        let mut going_on = Vec::new();
        for mut reader in readers {
            let mut goes_on = true;
            for stream in streams(100) {
                let call = reader.whole(200 * sent + stream, message);
                goes_on &= reader.say(&call).await;
            }
            if goes_on {
                going_on.push(reader);
            }
        }
        readers = going_on;
        sent += 1;
        target.is_alive().await;
    }
}

/// Requests in a row over HTTP/1 whose answers are not taken. `route` with `body` has a long one.
pub async fn requests(target: &Attacked, route: &str, body: &str) {
    let length = body.len();
    let request =
        format!("POST {route} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}");
    let unread = TcpStream::connect(target.process.http()).await;
    let mut unread = unread.expect("a connection");
    let ended = async { while unread.write_all(request.as_bytes()).await.is_ok() {} };
    let ended = tokio::time::timeout(Duration::from_secs(60), ended).await;
    ended.expect("a reader that stops is left");
}
