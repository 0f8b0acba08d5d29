//! The service as a process that is killed in the middle of a purchase: before LOMS has the order, and after.

use proto::cart::{AddToCartRequest, ListCartRequest};
use serde_json::{Value, json};
use sqlx::PgPool;
use tonic::Code;

use crate::{
    loms_stub::{LomsStub, Mood},
    process::Process,
    test_app::{
        Neighbours, assert_consistent, config, connect, count_open, eventually, purchase_request,
    },
};

async fn killed_while_loms_holds(pool: PgPool, mood: Mood) {
    let Neighbours {
        loms,
        addresses,
        serving: _serving,
        ..
    } = Neighbours::start().await;
    let config = config(
        &pool,
        addresses,
        &json!({"purchases": {"resume_after": "500ms"}}),
    );
    let mut process = Process::start(&config);
    let mut client = connect(process.grpc).await;
    loms.stock(5, 10);
    client
        .add_to_cart(AddToCartRequest {
            user: 1,
            sku: 5,
            count: 2,
        })
        .await
        .unwrap();
    loms.mood(mood);
    let (broken, ()) = tokio::join!(client.purchase(purchase_request(1, "")), async {
        loms.held().await;
        process.kill();
    });
    assert!(broken.is_err());
    assert_eq!(count_open(&pool).await, 1);
    loms.release();

    finished_by_the_next_process(&pool, &loms, &config).await;
}

async fn finished_by_the_next_process(pool: &PgPool, loms: &LomsStub, config: &Value) {
    let after = Process::start(config);
    finished_once(pool, loms).await;
    let mut client = connect(after.grpc).await;
    assert_eq!(
        client
            .purchase(purchase_request(1, ""))
            .await
            .unwrap()
            .into_inner()
            .order_id,
        1
    );
    let again = client.purchase(purchase_request(1, "")).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
    let listed = client
        .list_cart(ListCartRequest { user: 1 })
        .await
        .unwrap()
        .into_inner();
    assert!(listed.items.is_empty());
}

async fn finished_once(pool: &PgPool, loms: &LomsStub) {
    eventually("the worker finishes it", async || {
        count_open(pool).await == 0
    })
    .await;
    assert_eq!(loms.orders().len(), 1);
    assert_eq!(loms.on_sale(5), 8);
    assert_consistent(pool, loms).await;
}

#[sqlx::test]
async fn killed_before_loms_has_the_order(pool: PgPool) {
    killed_while_loms_holds(pool, Mood::HoldsBefore).await;
}

#[sqlx::test]
async fn killed_after_loms_has_the_order(pool: PgPool) {
    killed_while_loms_holds(pool, Mood::HoldsAfter).await;
}

/// A purchase that is cut by the process aborting at a named point.
#[cfg(feature = "failpoints")]
#[derive(Clone, Copy, Debug)]
struct Crash {
    user: i64,
    point: &'static str,
    /// Under an idempotency key.
    keyed: bool,
    /// The units are gone when LOMS is asked, so that the lines come back.
    short: bool,
    /// The next call comes when the worker has finished, or finishes it itself.
    waits_for_worker: bool,
}

/// Each point with a key and without, with the stock and without, finished by the worker and by the next call.
/// `CRASH_ROUNDS=100` for more.
#[cfg(feature = "failpoints")]
fn crashes() -> Vec<Crash> {
    let points = ["purchase-begun", "order-placed", "purchase-closing"];
    let given = std::env::var("CRASH_ROUNDS").ok();
    let rounds: usize = given.map_or(4 * points.len(), |text| text.parse().unwrap());
    let crash = |n: usize| Crash {
        user: i64::try_from(n).unwrap() + 1,
        point: points[n % points.len()],
        keyed: n / points.len() % 2 == 0,
        short: n / points.len() % 4 >= 2,
        waits_for_worker: n % 2 == 0,
    };
    (0..rounds).map(crash).collect()
}

#[cfg(feature = "failpoints")]
#[sqlx::test]
async fn aborted_at_each_crash_point(pool: PgPool) {
    let neighbours = Neighbours::start().await;
    let quick = json!({"purchases": {"resume_after": "500ms"}});
    let config = config(&pool, neighbours.addresses, &quick);
    for crash in crashes() {
        let before = neighbours.loms.orders().len();
        neighbours.loms.stock(5, 2);
        let process = Process::start_with(&config, &format!("{}=return", crash.point));
        let mut client = connect(process.grpc).await;
        let key = if crash.keyed { "k" } else { "" };
        let request = || purchase_request(crash.user, key);
        let (user, sku) = (crash.user, 5);
        let add = AddToCartRequest {
            user,
            sku,
            count: 2,
        };
        client.add_to_cart(add).await.unwrap();
        neighbours.loms.stock(5, if crash.short { 1 } else { 2 });
        assert!(client.purchase(request()).await.is_err(), "{crash:?}");
        assert_eq!(count_open(&pool).await, 1, "{crash:?}");
        let placed = neighbours.loms.orders().len() - before;
        assert_eq!(
            placed,
            usize::from(crash.point != "purchase-begun"),
            "{crash:?}"
        );
        drop(process);

        let after = Process::start(&config);
        let mut client = connect(after.grpc).await;
        if crash.waits_for_worker {
            let closed = async || count_open(&pool).await == 0;
            eventually("the worker finishes it", closed).await;
            assert_eq!(neighbours.loms.orders().len(), before + 1, "{crash:?}");
        }
        let told = client.purchase(request()).await;
        let orders = &neighbours.loms.orders()[before..];
        let listed = client.list_cart(ListCartRequest { user }).await.unwrap();
        let in_cart: u32 = listed
            .into_inner()
            .items
            .iter()
            .map(|item| item.count)
            .sum();
        if crash.short {
            assert_eq!(
                told.unwrap_err().code(),
                Code::FailedPrecondition,
                "{crash:?}"
            );
            // without a key, lines that the worker gave back are tried again
            let tries = if crash.waits_for_worker && !crash.keyed {
                2
            } else {
                1
            };
            assert_eq!((orders.len(), in_cart), (tries, 2), "{crash:?}");
            assert!(orders.iter().all(|order| order.status == "failed"));
        } else {
            assert_eq!(
                told.unwrap().into_inner().order_id,
                orders[0].id,
                "{crash:?}"
            );
            assert_eq!((orders.len(), in_cart), (1, 0), "{crash:?}");
        }
        assert_consistent(&pool, &neighbours.loms).await;
    }
}
