//! A synchronous standby that is gone: every commit waits, for as long as it takes. What waits is bounded, nothing of it is
//! cancelled, and when the standby is no longer asked for, everything that was acknowledged is there.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicI64, AtomicUsize, Ordering},
    time::Duration,
};

use devstack::{
    postgres,
    stack::{Options, Stack},
};
use futures::future::join_all;
use proto::loms::{CreateOrderRequest, ListOrderRequest, OrderItem, StocksRequest};
use sqlx::{Connection as _, PgConnection};
use tokio::{sync::Mutex, time::Instant};
use tonic::Code;

use crate::test_stack::{binaries, eventually};

/// Longer than a transaction's bound, several times, and as long as an answer is waited for.
const WITHOUT: Duration = Duration::from_secs(30);
const CALLERS: i64 = 16;
/// By name, the connections that LOMS may have: those in use, and a quarter more of callers' or one more of a worker's.
fn permitted(application: &str) -> i64 {
    match application {
        "loms" => 10 + 3,
        _ => 2,
    }
}

async fn run(admin: &mut PgConnection, statement: &str) {
    let statement = sqlx::AssertSqlSafe(statement.to_owned());
    sqlx::query(statement).execute(admin).await.unwrap();
}

async fn sessions(admin: &mut PgConnection) -> HashMap<String, i64> {
    let sessions = "SELECT application_name, count(*) FROM pg_stat_activity
                    WHERE application_name LIKE 'loms%' GROUP BY 1";
    let sessions: Vec<(String, i64)> = sqlx::query_as(sessions).fetch_all(admin).await.unwrap();
    sessions.into_iter().collect()
}

fn order(user: i64, key: &str) -> CreateOrderRequest {
    CreateOrderRequest {
        user,
        items: vec![OrderItem { sku: 7, count: 1 }],
        idempotency_key: key.to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_that_wait_for_a_standby_pile_nothing_up() {
    let options = Options {
        postgres: postgres::Source::Own,
        services: &["loms"],
        quiet: true,
        ..Options::new(binaries().await)
    };
    let stack = Stack::start(&options).await.unwrap();
    let file = stack.dir().join("stock.csv");
    std::fs::write(&file, "warehouse_id,sku,count\n1,7,1000000\n").unwrap();
    stack.receive_stock(&file).await.unwrap();
    let server = stack.admin_database("loms").unwrap();
    let mut admin = PgConnection::connect(&server).await.unwrap();
    let loms = crate::stopping::stack_caller(&stack);

    run(
        &mut admin,
        "ALTER SYSTEM SET synchronous_standby_names = 'nobody'",
    )
    .await;
    run(&mut admin, "SELECT pg_reload_conf()").await;
    let until = Instant::now() + WITHOUT;
    let (acknowledged, refused) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let (number, read) = (AtomicI64::new(0), AtomicUsize::new(0));
    let callers = join_all((0..CALLERS).map(async |caller| {
        let mut loms = loms.clone();
        while Instant::now() < until {
            let key = format!("k{}", number.fetch_add(1, Ordering::Relaxed));
            match loms.create_order(order(caller + 1, &key)).await {
                Ok(made) => acknowledged.lock().await.push(made.into_inner().order_id),
                Err(status) => {
                    let known = [
                        Code::Unavailable,
                        Code::ResourceExhausted,
                        Code::DeadlineExceeded,
                    ];
                    assert!(known.contains(&status.code()), "{status:?}");
                    refused.lock().await.push((caller + 1, key));
                }
            }
            if loms.stocks(StocksRequest { sku: 7 }).await.is_ok() {
                read.fetch_add(1, Ordering::Relaxed);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }));
    let watch = async {
        let mut most = HashMap::new();
        while Instant::now() < until {
            for (application, now) in sessions(&mut admin).await {
                let most = most.entry(application).or_insert(0);
                *most = now.max(*most);
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        most
    };
    let (_, most) = tokio::join!(callers, watch);
    let (read, refused) = (read.into_inner(), refused.into_inner());
    println!(
        "most sessions {most:?}, {} orders refused, {read} reads answered",
        refused.len()
    );
    for (application, most) in most {
        assert!(most <= permitted(&application), "{application}: {most}");
    }
    assert!(!refused.is_empty(), "no commit has waited");
    assert!(read > 100, "reading needs no standby: {read}");

    run(&mut admin, "ALTER SYSTEM RESET synchronous_standby_names").await;
    run(&mut admin, "SELECT pg_reload_conf()").await;
    eventually("orders again", async || {
        let answer = loms.clone().create_order(order(1, "afterwards")).await;
        answer.is_ok()
    })
    .await;
    // tried again with its key, each has one order, whether its commit had waited or never begun
    let mut acknowledged = acknowledged.into_inner();
    for (user, key) in refused {
        let made = loms.clone().create_order(order(user, &key)).await;
        acknowledged.push(made.unwrap().into_inner().order_id);
    }
    let orders: i64 = sqlx::query_scalar("SELECT count(*) FROM loms.user_order")
        .fetch_one(&mut admin)
        .await
        .unwrap();
    // and the one afterwards
    assert_eq!(orders, acknowledged.len() as i64 + 1);
    for id in acknowledged {
        let listed = loms
            .clone()
            .list_order(ListOrderRequest { order_id: id })
            .await;
        assert_eq!(
            listed.unwrap().into_inner().status,
            "awaiting payment",
            "{id}"
        );
    }
    let killed = "SELECT sum(sessions_killed)::bigint FROM pg_stat_database";
    let killed: i64 = sqlx::query_scalar(killed)
        .fetch_one(&mut admin)
        .await
        .unwrap();
    assert_eq!(killed, 0, "sessions ended by somebody");
    let log: String = sqlx::query_scalar("SELECT pg_read_file('start.log')")
        .fetch_one(&mut admin)
        .await
        .unwrap();
    assert!(log.contains("synchronous_standby_names"), "{log}");
    assert!(!log.contains("canceling wait for synchronous"), "{log}");
    let audit = stack.command("loms", &["audit"]).await.unwrap();
    assert!(audit.status.success(), "{}\n{}", audit.stdout, audit.stderr);
    stack.stop().await.unwrap();
}
