//! Frames and connections in masses.

use std::{net::SocketAddr, time::Duration};

use futures::future::join_all;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{Attacked, scaled};
use crate::http2::{
    CONTINUATION, GOAWAY, HEADERS, PING, RST_STREAM, Raw, SETTINGS, WINDOW_UPDATE, block, frame,
    streams,
};

/// Streams over the limit, each of which is answered with a reset; resets by the client; and
/// mistakes that are answered with a reset.
pub async fn of_streams(target: &Attacked, path: &str) {
    let nothing = |_| Vec::new();
    let reset = |stream| frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
    let mistake = |stream| frame(WINDOW_UPDATE, 0, stream, &0_u32.to_be_bytes());
    let follows: [&dyn Fn(u32) -> Vec<u8>; 3] = [&nothing, &reset, &mistake];
    for follow in follows {
        let mut flood = Raw::connect(target.grpc(), path, &[]).await;
        for stream in streams(scaled(5_000)) {
            let mut call = flood.call(stream);
            call.extend(follow(stream));
            if !flood.say(&call).await {
                break;
            }
        }
        target.is_alive().await;
    }
}

/// Frames that belong to no call, and headers without an end.
pub async fn of_frames(target: &Attacked, path: &str) {
    let floods = [
        frame(PING, 0, 0, &[7; 8]),
        // an answer to a ping that was never sent
        frame(PING, 1, 0, &[7; 8]),
        frame(SETTINGS, 0, 0, &[]),
        frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9]),
        frame(GOAWAY, 0, 0, &[0; 8]),
        frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()),
        frame(0x77, 0, 0, &[1; 100]),
    ];
    for bytes in floods {
        let mut flood = Raw::connect(target.grpc(), path, &[]).await;
        for _ in 0..scaled(20_000) {
            if !flood.say(&bytes).await {
                break;
            }
        }
        target.is_alive().await;
    }
    let mut endless = Raw::connect(target.grpc(), path, &[]).await;
    let headers = endless.headers();
    endless.say(&frame(HEADERS, 0, 1, &headers)).await;
    for number in 0..scaled(5_000) {
        let mut block = vec![0_u8];
        let name = format!("x-{number}");
        block.push(name.len() as u8);
        block.extend(name.as_bytes());
        block.push(100);
        block.extend([b'x'; 100]);
        if !endless.say(&frame(CONTINUATION, 0, 1, &block)).await {
            break;
        }
    }
    target.is_alive().await;
}

/// Metadata over the limit, and such that unpacks to a thousand times its bytes.
pub async fn of_metadata(target: &Attacked, path: &str) {
    let large = async || {
        let raw = Raw::connect(target.grpc(), path, &[]).await;
        raw.with("x-large", &"x".repeat(100_000))
    };
    let mut raw = large().await;
    for stream in streams(scaled(100)) {
        let call = raw.whole(stream, &[]);
        if !raw.say(&call).await {
            raw = large().await;
        }
    }
    target.is_alive().await;
    for round in 0..scaled(20) {
        let mut bomb = Raw::connect(target.grpc(), path, &[]).await;
        // an entry of the table, which takes 4,096 bytes, its own 32 among them
        let mut headers = bomb.headers();
        headers.extend([0x40, 6]);
        headers.extend(b"x-bomb");
        // the length 3,968, RFC 7541, 5.1
        headers.extend([127, 0x81, 0x1e]);
        headers.extend([b'x'; 3_968]);
        // the entry by its index, a byte each time
        headers.extend([0x80 | 62; 15_000]);
        for stream in streams(20) {
            if !bomb.say(&block(stream, &headers)).await {
                break;
            }
        }
        if round % 10 == 0 {
            target.is_alive().await;
        }
    }
}

/// Connections that begin and do not go on, of both ports, and such that say nothing. The service
/// has an `idle_timeout` and a `request_timeout` of seconds.
pub async fn of_beginnings(target: &Attacked, route: &str) {
    let (grpc, http) = (target.grpc(), target.process.http());
    let head = format!("POST {route} HTTP/1.1\r\nhost: x\r\n");
    let beginnings: [(SocketAddr, String); 8] = [
        (grpc, String::new()),
        (grpc, "P".to_owned()),
        (grpc, "PRI * HTTP/2.0\r\n\r\nSM".to_owned()),
        (grpc, "GET / HTTP/1.1\r\n".to_owned()),
        (http, String::new()),
        (http, format!("POST {route} HTT")),
        (http, format!("{head}x-slow: ")),
        (http, format!("{head}content-length: 900\r\n\r\n")),
    ];
    let mut slow = Vec::new();
    for (address, beginning) in beginnings {
        // with all others there may be 2,000
        for _ in 0..scaled(100).min(200) {
            let mut stream = TcpStream::connect(address).await.expect("a connection");
            // an end that comes already is found below
            stream.write_all(beginning.as_bytes()).await.ok();
            slow.push(stream);
        }
    }
    target.is_alive().await;
    // a byte now and then keeps none of them
    let trickled = slow.iter_mut().enumerate().map(async |(number, stream)| {
        let end = async {
            let mut answer = [0; 4096];
            loop {
                if number % 2 == 0 && stream.write_all(b"x").await.is_err() {
                    break;
                }
                let read = stream.read(&mut answer);
                let read = tokio::time::timeout(Duration::from_millis(500), read).await;
                if let Ok(Ok(0) | Err(_)) = read {
                    break;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), end).await
    });
    let ended = join_all(trickled).await;
    let going_on = ended.iter().filter(|ended| ended.is_err()).count();
    assert_eq!(going_on, 0, "connections go on");
    target.is_alive().await;
}
