//! A rolling restart: two replicas of LOMS, one after the other told to stop and started again, while callers place orders
//! and try again elsewhere, with the same key, whatever is UNAVAILABLE. No call fails, and no order is made twice.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use devstack::{
    ports::Reserved,
    stack::{Options, Stack},
};
use nix::sys::signal::Signal;
use proto::loms::{CreateOrderRequest, OrderItem, loms_client::LomsClient};
use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use tokio::task::JoinSet;
use tonic::{Code, Status, transport::Channel};

use crate::{replica::Replica, test_stack::binaries};

const HEART: u32 = 85_123_001;
const CALLERS: usize = 8;

/// How often both replicas are restarted; `ROLLING_ROUNDS` asks for more.
fn rounds() -> usize {
    let wanted = std::env::var("ROLLING_ROUNDS").unwrap_or_else(|_| "3".to_owned());
    wanted.parse().expect("ROLLING_ROUNDS is a number")
}

/// What a caller went through.
#[derive(Default)]
struct Seen {
    orders: HashMap<String, i64>,
    again: usize,
    slowest: Duration,
}

/// A caller as the README asks for: another replica, the same key, a little later, and only after UNAVAILABLE.
async fn place(
    replicas: &mut [LomsClient<Channel>; 2],
    at: &mut usize,
    key: &str,
    again: &mut usize,
) -> Result<i64, Status> {
    let request = CreateOrderRequest {
        user: 1,
        items: vec![OrderItem {
            sku: HEART,
            count: 1,
        }],
        idempotency_key: key.to_owned(),
    };
    let by = Instant::now() + Duration::from_secs(60);
    let mut pause = Duration::from_millis(5);
    loop {
        match replicas[*at].create_order(request.clone()).await {
            Ok(order) => return Ok(order.into_inner().order_id),
            Err(status) if status.code() == Code::Unavailable && Instant::now() < by => {
                *again += 1;
                *at = 1 - *at;
                tokio::time::sleep(pause.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
                pause = (pause * 2).min(Duration::from_millis(200));
            }
            Err(status) => return Err(status),
        }
    }
}

async fn call_on_and_on(
    mut replicas: [LomsClient<Channel>; 2],
    caller: usize,
    stop: Arc<AtomicBool>,
    placed: Arc<AtomicUsize>,
) -> Result<Seen, Status> {
    let (mut seen, mut at) = (Seen::default(), caller % 2);
    while !stop.load(Ordering::SeqCst) {
        let key = format!("{caller}-{}", seen.orders.len());
        let began = Instant::now();
        let order = place(&mut replicas, &mut at, &key, &mut seen.again).await?;
        seen.slowest = seen.slowest.max(began.elapsed());
        seen.orders.insert(key, order);
        placed.fetch_add(1, Ordering::SeqCst);
        // the replicas share the load, also when both are there
        at = 1 - at;
    }
    Ok(seen)
}

#[tokio::test]
async fn no_call_fails_while_both_replicas_are_restarted() {
    let options = Options {
        quiet: true,
        services: &["loms"],
        ..Options::new(binaries().await)
    };
    let mut stack = Stack::start(&options).await.unwrap();
    let file = stack.dir().join("delivery.csv");
    std::fs::write(
        &file,
        format!("warehouse_id,sku,count\n1,{HEART},100000000\n"),
    )
    .unwrap();
    stack.receive_stock(&file).await.unwrap();
    let ports: Vec<_> = (0..4).map(|_| Reserved::any().unwrap()).collect();
    let at = |grpc: usize, http: usize| json!({"grpc": {"listen": ports[grpc].address()}, "http": {"listen": ports[http].address()}});
    let mut replicas = [
        Replica::start(&stack, &at(0, 1)).await,
        Replica::start(&stack, &at(2, 3)).await,
    ];
    // the stack's own does not take part
    stack.parts().0[0].kill().await.unwrap();

    let (stop, placed) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let mut calling = JoinSet::new();
    for caller in 0..CALLERS {
        // a connection of its own each, as callers on other machines have
        let clients = [replicas[0].stranger(), replicas[1].stranger()];
        calling.spawn(call_on_and_on(
            clients,
            caller,
            stop.clone(),
            placed.clone(),
        ));
    }
    let goes_on = async |by: usize| {
        let (from, until) = (
            placed.load(Ordering::SeqCst),
            Instant::now() + Duration::from_secs(30),
        );
        while placed.load(Ordering::SeqCst) < from + by {
            assert!(Instant::now() < until, "no orders are placed any more");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    goes_on(20).await;
    for _ in 0..rounds() {
        for replica in &mut replicas {
            replica.signal(Signal::SIGTERM);
            let ended = replica.ended().await;
            assert_eq!(ended.code(), Some(0));
            goes_on(20).await;
            *replica = replica.start_again().await;
            goes_on(20).await;
        }
    }
    stop.store(true, Ordering::SeqCst);
    let (mut orders, mut again, mut slowest) = (HashMap::new(), 0, Duration::ZERO);
    while let Some(seen) = calling.join_next().await {
        let seen = seen.unwrap().expect("no call fails");
        orders.extend(seen.orders);
        again += seen.again;
        slowest = slowest.max(seen.slowest);
    }
    println!(
        "{} orders, {again} tries again, {} restarts, slowest call {slowest:?}",
        orders.len(),
        2 * rounds()
    );
    assert!(again > 0, "nobody noticed the restarts");
    recount(&stack, &orders).await;
    for replica in replicas {
        replica.stop().await;
    }
    let audit = stack.command("loms", &["audit"]).await.unwrap();
    assert!(audit.status.success(), "{}", audit.stdout);
    stack.stop().await.unwrap();
}

/// Every order that was answered is there under its key, and there is no other.
async fn recount(stack: &Stack, answered: &HashMap<String, i64>) {
    let mut db = PgConnection::connect(stack.database("loms").unwrap())
        .await
        .unwrap();
    let keys: Vec<(String, i64)> = sqlx::query_as("SELECT key, order_id FROM loms.idempotency_key")
        .fetch_all(&mut db)
        .await
        .unwrap();
    let kept: HashMap<_, _> = keys.into_iter().collect();
    assert_eq!(&kept, answered);
    let statement = "SELECT count(*) FROM loms.user_order WHERE status = 'awaiting payment'";
    let made: i64 = sqlx::query_scalar(statement)
        .fetch_one(&mut db)
        .await
        .unwrap();
    assert_eq!(made as usize, answered.len());
}
