//! What a caller sends, or does not read, stops nothing: each attack once, small, on a process of
//! its own. `ATTACK_SCALE=20` makes them larger.

use std::time::{Duration, Instant};

use futures::future::join_all;
use proto::loms::{StocksRequest, loms_client::LomsClient};
use serde_json::json;
use testkit::{
    attack::{floods, scaled, unread},
    http2::{DATA, END_STREAM, PING, RST_STREAM, Raw, frame, streams},
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

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_streams() {
    let target = Target::start(json!({})).await;
    for path in [REFLECTION, STOCKS, "/loms.Loms/Nothing", "/"] {
        floods::of_streams(&target, path).await;
    }
    target.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_frames() {
    let target = Target::start(json!({})).await;
    floods::of_frames(&target, STOCKS).await;
    target.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_over_the_limit() {
    let target = Target::start(json!({})).await;
    floods::of_metadata(&target, STOCKS).await;
    target.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beginnings_that_take_for_ever() {
    let limits = json!({"idle_timeout": "2s", "request_timeout": "2s"});
    let target = Target::start(limits).await;
    floods::of_beginnings(&target, "/createOrder").await;
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
    let (path, message) = ("/loms.Loms/ListOrder", target.ask_for_large());
    // short answers too, which go in one piece
    let mut short = Raw::unread(target.grpc(), STOCKS, &[(4, 0)]).await;
    for stream in streams(100) {
        let call = short.whole(stream, &[8, 7]);
        short.say(&call).await;
    }
    unread::windows(&target, path, &message).await;
    unread::left(&mut short).await;

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
    let body = json!({"orderID": target.large}).to_string();
    unread::requests(&target, "/listOrder", &body).await;
    target.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_are_not_read() {
    let limits = json!({"memory": 8 << 20, "write_timeout": "2s"});
    let target = Target::start(limits).await;
    unread::sockets(&target, "/loms.Loms/ListOrder", &target.ask_for_large()).await;
    target.large_is_listed().await;
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
    // there may be 2,000
    let connections = scaled(500).min(1_500);
    let calls = (0..connections).map(async |number| {
        let mut raw = target.raw(&format!("/loms.Loms/M{number}")).await;
        let call = raw.whole(1, &[]);
        raw.say(&call).await;
        raw
    });
    let _open = join_all(calls).await;
    let codes = [
        "Unimplemented",
        "ResourceExhausted",
        "DeadlineExceeded",
        "Canceled",
    ];
    eventually("counted under one name", async || {
        let mut counted = 0;
        for code in codes {
            counted += target.counted(code, "unknown").await;
        }
        counted >= u64::from(connections)
    })
    .await;
    let metrics = format!("http://{}/metrics", target.process.http());
    let metrics = reqwest::get(metrics).await.unwrap().text().await.unwrap();
    assert!(!metrics.contains("/loms.Loms/M"), "{metrics}");
    target.forget_refusals();
    target.finish().await;
}

/// Deadlines that nothing can meet: each call is counted, and makes a whole order or none.
#[tokio::test(flavor = "multi_thread")]
async fn deadlines_of_a_millisecond() {
    let target = Target::start(json!({})).await;
    let method = "/loms.Loms/CreateOrder";
    let order = [8, 2, 18, 4, 8, 7, 16, 1];
    let mut hasty = Vec::new();
    for timeout in ["1m", "1u", "0n"] {
        let raw = target.raw(method).await;
        hasty.push(raw.with("grpc-timeout", timeout));
    }
    let mut sent = 0;
    for stream in streams(scaled(500)) {
        for raw in &mut hasty {
            let call = raw.whole(stream, &order);
            sent += u64::from(raw.say(&call).await);
        }
        // no more at once than one connection may have
        if stream % 128 == 1 {
            target.is_alive().await;
        }
    }
    let codes = ["OK", "DeadlineExceeded", "Canceled", "ResourceExhausted"];
    let counted = async || {
        let mut counts = Vec::new();
        for code in codes {
            counts.push(target.counted(code, method).await);
        }
        counts
    };
    eventually("every call has its answer", async || {
        let counts = counted().await;
        // but for the large order
        counts.iter().sum::<u64>() == sent + 1
    })
    .await;
    let counts = counted().await;
    assert!(counts[1] > 0, "{counts:?}");
    for code in ["Internal", "Unknown", "Unavailable"] {
        assert_eq!(target.counted(code, method).await, 0, "{code}");
    }
    target.finish().await;
}

/// More connections at once than the kernel keeps by default, while nothing accepts them.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_connections_loses_none() {
    let target = Target::start(json!({})).await;
    target.process.signal("-STOP");
    let mut burst = Vec::new();
    for _ in 0..500 {
        let raw =
            tokio::time::timeout(Duration::from_secs(5), target.raw("/loms.Loms/Burst")).await;
        let mut raw = raw.expect("a connection at once");
        let call = raw.whole(1, &[]);
        raw.say(&call).await;
        burst.push(raw);
    }
    target.process.signal("-CONT");
    eventually("every call is answered", async || {
        target.counted("Unimplemented", "unknown").await >= 500
    })
    .await;
    target.finish().await;
}
