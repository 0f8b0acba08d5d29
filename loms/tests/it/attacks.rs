//! What a caller sends, or does not read, stops nothing: each attack once, small, on a process of
//! its own. `ATTACK_SCALE=20` makes them larger.

use std::time::{Duration, Instant};

use futures::future::join_all;
use proto::loms::{StocksRequest, loms_client::LomsClient};
use serde_json::json;
use testkit::{
    attack::scaled,
    http2::{
        CONTINUATION, DATA, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, Raw, SETTINGS,
        WINDOW_UPDATE, frame, streams,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, transport::Channel};
use tonic_types::StatusExt as _;

use crate::{
    target::Target,
    test_app::{eventually, lock_waiters, sit_on},
};

const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
const STOCKS: &str = "/loms.Loms/Stocks";

/// Streams over the limit, each of which is answered with a reset; and resets by the client.
#[tokio::test(flavor = "multi_thread")]
async fn floods_of_streams() {
    let target = Target::start(json!({})).await;
    for path in [REFLECTION, STOCKS, "/loms.Loms/Nothing", "/"] {
        let mut flood = target.raw(path).await;
        for stream in streams(scaled(5_000)) {
            let call = flood.call(stream);
            if !flood.say(&call).await {
                break;
            }
        }
        target.is_alive().await;
        let mut rapid = target.raw(path).await;
        for stream in streams(scaled(5_000)) {
            let mut call = rapid.call(stream);
            call.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
            if !rapid.say(&call).await {
                break;
            }
        }
        target.is_alive().await;
        // each of these is a mistake that is answered with a reset
        let mut mistaken = target.raw(path).await;
        for stream in streams(scaled(5_000)) {
            let mut call = mistaken.call(stream);
            call.extend(frame(WINDOW_UPDATE, 0, stream, &0_u32.to_be_bytes()));
            if !mistaken.say(&call).await {
                break;
            }
        }
        target.is_alive().await;
    }
    target.finish().await;
}

/// Frames that belong to no call.
#[tokio::test(flavor = "multi_thread")]
async fn floods_of_frames() {
    let target = Target::start(json!({})).await;
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
        let mut flood = target.raw(STOCKS).await;
        for _ in 0..scaled(20_000) {
            if !flood.say(&bytes).await {
                break;
            }
        }
        target.is_alive().await;
    }
    // headers without an end, and such that unpack to more than was sent
    let mut endless = target.raw(STOCKS).await;
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
    target.finish().await;
}

/// Messages that are announced and never sent take bytes, and no place of a call.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_never_end() {
    let target = Target::start(json!({"request_timeout": "3s"})).await;
    let mut attackers = Vec::new();
    for _ in 0..scaled(8) {
        let mut attacker = target.raw(STOCKS).await;
        for stream in streams(100) {
            let mut call = attacker.call(stream);
            // 4 MiB are announced
            call.extend(frame(DATA, 0, stream, &[0, 0, 0x40, 0, 0]));
            attacker.say(&call).await;
        }
        attackers.push(attacker);
    }
    eventually("refusals for want of room", async || {
        target.counted("ResourceExhausted", STOCKS).await > 0
    })
    .await;
    target.is_alive().await;
    let late = target.counted("DeadlineExceeded", STOCKS).await;
    eventually("the deadline of the others", async || {
        target.counted("DeadlineExceeded", STOCKS).await > late
    })
    .await;

    // headers alone, again and again
    let mut headers = target.raw(STOCKS).await;
    for stream in streams(128) {
        let call = headers.call(stream);
        headers.say(&call).await;
    }
    target.is_alive().await;

    // over HTTP
    let mut bodies = Vec::new();
    for _ in 0..scaled(50) {
        let mut body = TcpStream::connect(target.process.http()).await.unwrap();
        let head =
            "POST /createOrder HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{\"user\":";
        body.write_all(head.as_bytes()).await.unwrap();
        bodies.push(body);
    }
    target.is_alive().await;
    drop((attackers, headers, bodies));
    target.finish().await;
}

/// Answers that are not read: the window is shut, or the socket is not read at all.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_not_read() {
    let target = Target::start(json!({"write_timeout": "1s", "idle_timeout": "3s"})).await;
    let message = target.ask_for_large();
    let path = "/loms.Loms/ListOrder";
    let mut readers = Vec::new();
    // short answers too, which go in one piece
    let mut short = Raw::unread(target.grpc(), STOCKS, &[(4, 0)]).await;
    for stream in streams(100) {
        let call = short.whole(stream, &[8, 7]);
        short.say(&call).await;
    }
    readers.push(short);
    // a window of nothing, and one that lets a byte through
    for window in [0, 1] {
        for _ in 0..scaled(4) {
            let mut reader = Raw::unread(target.grpc(), path, &[(4, window)]).await;
            for stream in streams(100) {
                let call = reader.whole(stream, &message);
                reader.say(&call).await;
            }
            readers.push(reader);
        }
    }
    target.is_alive().await;
    for reader in &mut readers {
        let ping = frame(PING, 0, 0, &[1; 8]);
        let by = Instant::now() + Duration::from_secs(30);
        while reader.say(&ping).await {
            assert!(Instant::now() < by, "the connection goes on");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    // one slow reader on a connection of others loses its answer and nothing else
    let mut slow = Raw::connect(target.grpc(), path, &[(4, 0)]).await;
    let call = slow.whole(1, &message);
    slow.say(&call).await;
    let by = Instant::now() + Duration::from_secs(5);
    while Instant::now() < by {
        assert!(
            slow.say(&frame(PING, 0, 0, &[1; 8])).await,
            "the connection goes on"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    // HTTP/1: requests in a row whose answers are not taken
    let request = format!(
        "POST /listOrder HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{{\"orderID\":{}}}",
        11 + target.large.to_string().len() + 1,
        target.large
    );
    let mut unread = TcpStream::connect(target.process.http()).await.unwrap();
    let mut written = 0;
    let ended = async {
        while unread.write_all(request.as_bytes()).await.is_ok() {
            written += 1;
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), ended).await;
    ended.expect("a reader that stops is left");
    assert!(written > 10, "{written}");
    target.finish().await;
}

/// Connections that say nothing, and one more than there may be.
#[tokio::test(flavor = "multi_thread")]
async fn more_connections_than_there_may_be() {
    let target = Target::start(json!({"connections": 20})).await;
    // two of the caller's, one each of the test's clients
    let mut silent = Vec::new();
    for _ in 0..16 {
        silent.push(TcpStream::connect(target.grpc()).await.unwrap());
    }
    target.is_alive().await;
    let mut told = None;
    for _ in 0..2 {
        let endpoint = Channel::from_shared(format!("http://{}", target.grpc())).unwrap();
        let mut one_more = LomsClient::new(endpoint.connect().await.unwrap());
        told = one_more
            .stocks(StocksRequest { sku: 7 })
            .await
            .err()
            .or(told);
        silent.push(TcpStream::connect(target.grpc()).await.unwrap());
    }
    let told = told.expect("a refusal");
    assert_eq!(told.code(), Code::ResourceExhausted);
    assert_eq!(told.get_details_error_info().unwrap().reason, "CONNECTIONS");
    // far more, which are closed without a word
    for _ in 0..scaled(500) {
        silent.push(TcpStream::connect(target.grpc()).await.unwrap());
    }
    let mut last = silent.pop().unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), last.read(&mut [0; 9])).await;
    assert!(matches!(ended.expect("an end"), Ok(0) | Err(_)));
    target.is_alive().await;
    drop(silent);
    target.finish().await;
}

/// What clients do wrong is told as theirs, and calls whose caller leaves are counted.
#[tokio::test(flavor = "multi_thread")]
async fn mistakes_of_callers_are_theirs() {
    let target = Target::start(json!({})).await;
    let method = "/loms.Loms/CreateOrder";
    let mut raw = target.raw(method).await;
    let mut stream = 1;
    // a wrong wire type, an unknown one, a length that is longer than the message, a key that is no
    // UTF-8
    for message in [&[8, 255][..], &[15, 1], &[18, 100, 1], &[26, 2, 255, 254]] {
        let call = raw.whole(stream, message);
        raw.say(&call).await;
        stream += 2;
    }
    // nothing at all, and half of a message
    let mut none = raw.call(stream);
    none.extend(frame(DATA, END_STREAM, stream, &[]));
    let mut half = raw.call(stream + 2);
    half.extend(frame(DATA, END_STREAM, stream + 2, &[0, 0, 0, 0, 9, 1]));
    raw.say(&none).await;
    raw.say(&half).await;
    eventually("six mistakes", async || {
        target.counted("InvalidArgument", method).await == 6
    })
    .await;
    // what is said to be compressed and is not
    let garbage = raw.compressed(stream + 4, &[7; 30]);
    raw.say(&garbage).await;
    eventually("one more", async || {
        target.counted("InvalidArgument", method).await == 7
    })
    .await;
    let mut too_large = raw.call(stream + 6);
    too_large.extend(frame(DATA, 0, stream + 6, &[0, 255, 255, 255, 255]));
    raw.say(&too_large).await;
    eventually("a refusal", async || {
        target.counted("ResourceExhausted", method).await == 1
    })
    .await;

    // every call that makes an order is counted, also one whose caller leaves before it hears
    let held = sit_on(&target.pool, "loms.stock WHERE sku = 7").await;
    let mut leaving = target.raw(method).await;
    let order = [8, 2, 18, 4, 8, 7, 16, 1];
    for stream in streams(100) {
        let call = leaving.whole(stream, &order);
        leaving.say(&call).await;
    }
    lock_waiters(&target.pool, 1).await;
    for stream in streams(100) {
        leaving
            .say(&frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()))
            .await;
    }
    eventually("callers who have gone", async || {
        target.counted("Canceled", method).await > 0
    })
    .await;
    held.rollback().await.unwrap();
    // a stream that is reset before it is accepted is no call, and makes no order
    eventually("as many calls as orders", async || {
        let orders = target.orders_of_two().await.unsigned_abs();
        let gone = target.counted("Canceled", method).await;
        // but for the large order
        let answered = target.counted("OK", method).await - 1;
        gone + answered >= orders
    })
    .await;
    for code in ["Internal", "Unknown"] {
        assert_eq!(target.counted(code, method).await, 0, "{code}");
    }
    target.finish().await;
}

/// Unknown method names do not become labels of metrics.
#[tokio::test(flavor = "multi_thread")]
async fn made_up_names_are_no_labels() {
    let target = Target::start(json!({"in_flight": 1})).await;
    let calls = (0..scaled(500)).map(async |number| {
        let mut raw = target.raw(&format!("/loms.Loms/M{number}")).await;
        let call = raw.whole(1, &[]);
        raw.say(&call).await;
        raw
    });
    let _open = join_all(calls).await;
    eventually("counted under one name", async || {
        target.counted("Unimplemented", "unknown").await
            + target.counted("ResourceExhausted", "unknown").await
            >= u64::from(scaled(500))
    })
    .await;
    target.refusals_are_no_failures();
    target.finish().await;
}

/// Windows of 2 GiB, and sockets that are not read.
#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_are_not_read() {
    let limits = json!({"memory": 8 << 20, "write_timeout": "2s"});
    let target = Target::start(limits).await;
    let message = target.ask_for_large();
    let open = (1_u32 << 31) - 1;
    let path = "/loms.Loms/ListOrder";
    let mut readers = Vec::new();
    for _ in 0..scaled(10) {
        let mut reader = Raw::deaf(target.grpc(), path, &[(4, open)]).await;
        let wider = frame(WINDOW_UPDATE, 0, 0, &(open - 65_535).to_be_bytes());
        reader.say(&wider).await;
        readers.push(reader);
    }
    // the kernel takes some, then HTTP/2 keeps a little of each, and a socket that takes no more is
    // left
    let mut sent = 0;
    let by = Instant::now() + Duration::from_secs(90);
    while !readers.is_empty() {
        assert!(Instant::now() < by, "{} connections go on", readers.len());
        let mut going_on = Vec::new();
        for mut reader in readers {
            let mut goes_on = true;
            for stream in streams(100) {
                let call = reader.whole(200 * sent + stream, &message);
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
    target.large_is_listed().await;
    target.finish().await;
}
