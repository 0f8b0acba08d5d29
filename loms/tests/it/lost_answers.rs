//! The answer that is lost after the commit: the request arrived, the work is done, and the caller hears that the line
//! broke. With a key, asking again is safe every time.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::future::join_all;
use proto::loms::{self as pb, loms_client::LomsClient};
use serde_json::json;
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
};
use tonic::{Status, transport::Channel};

use crate::{
    oracle::{self, no_deadlocks},
    test_app::{TestApp, order, scale},
};

/// A line that delivers every request, and breaks when the first answer begins to come back.
struct Line {
    address: SocketAddr,
    lost: Arc<AtomicUsize>,
    _running: JoinSet<()>,
}

impl Line {
    async fn to(service: SocketAddr) -> Line {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.expect("a listener");
        let (lost, mut running) = (Arc::new(AtomicUsize::new(0)), JoinSet::new());
        let (address, count) = (listener.local_addr().expect("an address"), lost.clone());
        running.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let (far, count) = (TcpStream::connect(service).await, count.clone());
                connections.spawn(async move {
                    let (mut from, to) = near.into_split();
                    let (answers, mut requests) = far.expect("the service").into_split();
                    tokio::select! {
                        _ = tokio::io::copy(&mut from, &mut requests) => {}
                        answered = until_an_answer(answers, to) => {
                            if answered.is_ok() {
                                count.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
        });
        Line {
            address,
            lost,
            _running: running,
        }
    }

    /// A connection of its own, and what becomes of a call on it.
    async fn call<T>(
        &self,
        call: impl AsyncFnOnce(&mut LomsClient<Channel>) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let endpoint = Channel::from_shared(format!("http://{}", self.address));
        let channel = endpoint.expect("an address").connect().await;
        call(&mut LomsClient::new(channel.expect("a line"))).await
    }

    fn lost(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Passes HTTP/2 frames on, and ends without passing on the first HEADERS: an answer begins with it.
async fn until_an_answer(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
    const HEADERS: u8 = 1;
    let mut frame = Vec::new();
    loop {
        let mut head = [0; 9];
        from.read_exact(&mut head).await?;
        let [a, b, c, kind, ..] = head;
        if kind == HEADERS {
            return Ok(());
        }
        frame.clear();
        frame.extend_from_slice(&head);
        frame.resize(9 + u32::from_be_bytes([0, a, b, c]) as usize, 0);
        from.read_exact(&mut frame[9..]).await?;
        to.write_all(&frame).await?;
    }
}

/// The service, and the line to it on which answers are lost.
async fn start(pool: &PgPool) -> (TestApp, Line) {
    let app = TestApp::start(pool, json!({})).await;
    app.receive("d1", &[(1, 7, 10_000)]).await.expect("stock");
    let line = Line::to(app.grpc_addr).await;
    (app, line)
}

/// The caller has heard nothing from the service, not even a refusal.
#[track_caller]
fn assert_unanswered<T>(call: Result<T, Status>) {
    match call {
        Ok(_) => panic!("an answer came through"),
        Err(status) => assert!(!status.metadata().contains_key("x-trace-id"), "{status:?}"),
    }
}

async fn orders_of(pool: &PgPool, user: i64) -> Vec<i64> {
    sqlx::query_scalar("SELECT id FROM loms.user_order WHERE user_id = $1")
        .bind(user)
        .fetch_all(pool)
        .await
        .expect("rows")
}

#[tokio::test]
async fn the_retry_with_the_same_key_is_the_same_order() {
    let pool = crate::database().await;
    let (app, line) = start(&pool).await;
    let rounds = 50 * scale();
    for round in 1..=rounds {
        let user = round as i64;
        let request = order(user, &[(7, 1)], "k");
        let create = async |loms: &mut LomsClient<Channel>| loms.create_order(request).await;
        assert_unanswered(line.call(create).await);
        // it was an answer that was lost: the commit was before it
        assert_eq!(line.lost(), round);
        let [made] = orders_of(&pool, user).await[..] else {
            panic!("round {round}")
        };
        let again = app.try_create(order(user, &[(7, 1)], "k")).await.unwrap();
        assert_eq!(
            (again.order_id, again.status.as_str()),
            (made, "awaiting payment")
        );
        assert_eq!(orders_of(&pool, user).await, [made]);
    }
    app.finish().await;
}

#[tokio::test]
async fn a_payment_and_a_cancellation_happen_once() {
    let pool = crate::database().await;
    let (app, line) = start(&pool).await;
    for _ in 0..5 * scale() {
        let order_id = app.create(1, &[(7, 1)]).await.order_id;
        let request = pb::OrderPayedRequest { order_id };
        let pay = async |loms: &mut LomsClient<Channel>| loms.order_payed(request).await;
        assert_unanswered(line.call(pay).await);
        assert_eq!(app.list(order_id).await.status, "payed");
        app.pay(order_id).await.unwrap();

        let order_id = app.create(1, &[(7, 1)]).await.order_id;
        let request = pb::CancelOrderRequest { order_id };
        let cancel = async |loms: &mut LomsClient<Channel>| loms.cancel_order(request).await;
        assert_unanswered(line.call(cancel).await);
        assert_eq!(app.list(order_id).await.status, "cancelled");
        app.cancel(order_id).await.unwrap();
    }
    app.finish().await;
}

#[tokio::test]
async fn many_callers_lose_one_line() {
    let pool = crate::database().await;
    let (app, line) = start(&pool).await;
    for round in 0..5 * scale() {
        // one answer ends the calls of all: those that are done, those that have begun and those that are on their way
        let users: Vec<i64> = (1..=30).map(|n| round as i64 * 30 + n).collect();
        let place = async |loms: &mut LomsClient<Channel>| {
            let calls = users.iter().map(|user| {
                let mut loms = loms.clone();
                async move { loms.create_order(order(*user, &[(7, 1)], "k")).await }
            });
            Ok(join_all(calls).await)
        };
        for call in line.call(place).await.unwrap() {
            assert_unanswered(call);
        }
        let again = users
            .iter()
            .map(|user| app.try_create(order(*user, &[(7, 1)], "k")));
        for (user, again) in users.iter().zip(join_all(again).await) {
            assert_eq!(orders_of(&pool, *user).await, [again.unwrap().order_id]);
        }
    }
    let all = "SELECT count(*) FROM loms.user_order";
    assert_eq!(oracle::count(&pool, all).await, 150 * scale() as i64);
    let users: BTreeSet<(i64,)> = oracle::rows(&pool, "SELECT user_id FROM loms.user_order")
        .await
        .into_iter()
        .collect();
    assert_eq!(users.len(), 150 * scale());
    app.finish().await;
    no_deadlocks(&pool).await;
}
