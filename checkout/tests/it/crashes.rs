//! The service as a process that is killed in the middle of a purchase: before LOMS has the order and after, and when the
//! outcome is settled but nobody has heard it.

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
#[cfg(feature = "failpoints")]
use {
    crate::test_app::refused,
    proto::cart::{PurchaseRequest, cart_client::CartClient},
    tonic::transport::Channel,
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

#[tokio::test]
async fn killed_before_loms_has_the_order() {
    let pool = crate::database().await;
    killed_while_loms_holds(pool, Mood::HoldsBefore).await;
}

#[tokio::test]
async fn killed_after_loms_has_the_order() {
    let pool = crate::database().await;
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

#[cfg(feature = "failpoints")]
const POINTS: [&str; 4] = [
    "purchase-begun",
    "order-placed",
    "purchase-closing",
    "purchase-closed",
];

/// Each point with a key and without, with the stock and without, finished by the worker and by the next call.
/// `CRASH_ROUNDS=100` for more.
#[cfg(feature = "failpoints")]
fn crashes() -> Vec<Crash> {
    let given = std::env::var("CRASH_ROUNDS").ok();
    let rounds: usize = given.map_or(4 * POINTS.len(), |text| text.parse().unwrap());
    let crash = |n: usize| {
        let (turn, point) = (n / POINTS.len(), n % POINTS.len());
        Crash {
            user: i64::try_from(n).unwrap() + 1,
            point: POINTS[point],
            keyed: turn % 2 == 0,
            short: turn % 4 >= 2,
            waits_for_worker: (point + turn + turn / 4) % 2 == 0,
        }
    };
    (0..rounds).map(crash).collect()
}

#[cfg(feature = "failpoints")]
impl Crash {
    fn request(&self) -> PurchaseRequest {
        purchase_request(self.user, if self.keyed { "k" } else { "" })
    }

    /// Committed before the crash; only that it was told was not.
    fn is_settled(&self) -> bool {
        self.point == "purchase-closed"
    }

    /// Fills a cart of two units and dies while they are bought.
    async fn happen(&self, config: &Value, loms: &LomsStub) {
        loms.stock(5, 2);
        let process = Process::start_with(config, &format!("{}=return", self.point));
        let mut client = connect(process.grpc).await;
        let add = AddToCartRequest {
            user: self.user,
            sku: 5,
            count: 2,
        };
        client.add_to_cart(add).await.unwrap();
        loms.stock(5, if self.short { 1 } else { 2 });
        assert!(client.purchase(self.request()).await.is_err(), "{self:?}");
    }

    /// How many orders there are once the next call is answered. Without a key, lines that were given back before it
    /// came are tried again.
    fn orders(&self) -> usize {
        let given_back = self.short && (self.waits_for_worker || self.is_settled());
        if given_back && !self.keyed { 2 } else { 1 }
    }

    /// What the next call is answered, and that the one after it has nothing to do.
    async fn is_told(&self, client: &mut CartClient<Channel>, before: usize, loms: &LomsStub) {
        let told = client.purchase(self.request()).await;
        if self.short {
            assert_eq!(
                told.unwrap_err().code(),
                Code::FailedPrecondition,
                "{self:?}"
            );
            return;
        }
        let order = loms.orders()[before].id;
        assert_eq!(told.unwrap().into_inner().order_id, order, "{self:?}");
        let keyless = client.purchase(purchase_request(self.user, "")).await;
        refused(keyless, Code::FailedPrecondition, "EMPTY_CART");
    }
}

#[cfg(feature = "failpoints")]
#[tokio::test]
async fn aborted_at_each_crash_point() {
    let pool = crate::database().await;
    let neighbours = Neighbours::start().await;
    let loms = &neighbours.loms;
    let quick = json!({"purchases": {"resume_after": "500ms"}});
    let config = config(&pool, neighbours.addresses, &quick);
    for crash in crashes() {
        let before = loms.orders().len();
        crash.happen(&config, loms).await;
        let open = i64::from(!crash.is_settled());
        assert_eq!(count_open(&pool).await, open, "{crash:?}");
        let placed = usize::from(crash.point != "purchase-begun");
        assert_eq!(loms.orders().len() - before, placed, "{crash:?}");

        let after = Process::start(&config);
        let mut client = connect(after.grpc).await;
        if crash.waits_for_worker {
            let closed = async || count_open(&pool).await == 0;
            eventually("the worker finishes it", closed).await;
            assert_eq!(loms.orders().len(), before + 1, "{crash:?}");
        }
        crash.is_told(&mut client, before, loms).await;
        let orders = &loms.orders()[before..];
        assert_eq!(orders.len(), crash.orders(), "{crash:?}");
        let living = orders.iter().any(|order| order.status != "failed");
        assert_eq!(living, !crash.short, "{crash:?}");
        let user = crash.user;
        let listed = client.list_cart(ListCartRequest { user }).await.unwrap();
        let items = listed.into_inner().items;
        let in_cart: u32 = items.iter().map(|item| item.count).sum();
        assert_eq!(in_cart, if crash.short { 2 } else { 0 }, "{crash:?}");
        assert_consistent(&pool, loms).await;
    }
}
