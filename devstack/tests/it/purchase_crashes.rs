//! Purchases between a real checkout and a real LOMS while checkout is killed or answers are lost: one order each, and
//! the cart right, whoever finishes it.

use std::time::Duration;

use devstack::clients::reason;
use proto::{
    cart::{AddToCartRequest, ListCartRequest, PurchaseRequest},
    loms::{CreateOrderRequest, OrderItem},
};
use tonic::{Code, Request, Status};

use crate::{line::Held, scene::Scene, test_stack::eventually};

/// What happens to a purchase on its way.
#[derive(Clone, Copy, Debug)]
enum Mishap {
    /// `kill -9` when the lines are in the purchase, and LOMS has not heard of it; what was said to it arrives later.
    KilledBeforeLoms,
    /// `kill -9` when LOMS has the order, and its answer is on its way.
    KilledAfterLoms,
    /// `kill -9` when the answer is there, and the purchase is about to be closed.
    KilledBeforeClosing,
    /// The answer of LOMS is lost with its connection.
    LomsAnswerLost,
    /// The answer to the caller is lost with its connection.
    AnswerLost,
    /// The caller waits no longer.
    CallerLeaves,
}

const MISHAPS: [Mishap; 6] = [
    Mishap::KilledBeforeLoms,
    Mishap::KilledAfterLoms,
    Mishap::KilledBeforeClosing,
    Mishap::LomsAnswerLost,
    Mishap::AnswerLost,
    Mishap::CallerLeaves,
];

/// Every mishap with and without a key; `CRASH_ROUNDS=100` for all of them with and without stock, finished by the worker
/// and by the next call.
fn rounds() -> usize {
    let given = std::env::var("CRASH_ROUNDS").ok();
    given.map_or(2 * MISHAPS.len(), |text| text.parse().unwrap())
}

/// The stock of each round's own SKU.
const UNITS: u64 = 10;
/// What its user puts into the cart.
const IN_CART: u32 = 4;

/// One purchase.
#[derive(Clone, Copy, Debug)]
struct Round {
    number: usize,
    mishap: Mishap,
    /// Under an idempotency key.
    keyed: bool,
    /// Somebody else takes the units first, so that the order fails.
    short: bool,
    /// The next call comes at once, or only when the worker has finished.
    waits_for_worker: bool,
}

impl Round {
    fn new(number: usize) -> Self {
        let turn = number / MISHAPS.len();
        Self {
            number,
            mishap: MISHAPS[number % MISHAPS.len()],
            keyed: turn % 2 == 1,
            short: (number + turn) % 3 == 2,
            waits_for_worker: (number + turn / 2) % 2 == 1,
        }
    }

    fn user(&self) -> i64 {
        1_000 + i64::try_from(self.number).unwrap()
    }

    fn sku(&self) -> u32 {
        7_000_000 + u32::try_from(self.number).unwrap()
    }

    fn purchase(&self) -> PurchaseRequest {
        PurchaseRequest {
            user: self.user(),
            idempotency_key: if self.keyed {
                "k".to_owned()
            } else {
                String::new()
            },
        }
    }
}

async fn fill_cart(scene: &mut Scene, round: &Round) {
    let request = AddToCartRequest {
        user: round.user(),
        sku: round.sku(),
        count: IN_CART,
    };
    scene.caller().add_to_cart(request).await.unwrap();
    if round.short {
        let items = vec![OrderItem {
            sku: round.sku(),
            count: u32::try_from(UNITS).unwrap() - IN_CART + 1,
        }];
        let request = CreateOrderRequest {
            user: 1,
            items,
            ..Default::default()
        };
        scene
            .stack
            .clients
            .loms
            .create_order(request)
            .await
            .unwrap();
    }
}

/// The purchase with its mishap; afterwards checkout runs, and no line is held.
async fn mishap(scene: &mut Scene, round: &Round) -> Result<i64, Status> {
    let mut caller = scene.caller();
    // connected before anything is held
    caller.list_cart(ListCartRequest { user: 1 }).await.unwrap();
    let mut request = Request::new(round.purchase());
    match round.mishap {
        Mishap::KilledBeforeLoms => scene.to_loms.hold(Held::Requests),
        Mishap::AnswerLost => scene.to_checkout.hold(Held::Answers),
        Mishap::CallerLeaves => {
            request.set_timeout(Duration::from_millis(700));
            scene.to_loms.hold(Held::Answers);
        }
        _ => scene.to_loms.hold(Held::Answers),
    }
    let calling = async {
        caller
            .purchase(request)
            .await
            .map(|answer| answer.into_inner().order_id)
    };
    let (answer, ()) = tokio::join!(calling, happen(scene, round));
    scene.to_loms.hold(Held::Nothing);
    answer
}

async fn happen(scene: &mut Scene, round: &Round) {
    match round.mishap {
        Mishap::KilledBeforeLoms => {
            eventually("LOMS would hear of it", async || scene.to_loms.is_holding()).await;
            assert_eq!(
                scene.purchases(round.user()).await,
                [None],
                "written down before that"
            );
            scene.kill().await;
            assert_eq!(scene.orders(round.user()).await, []);
            // what the dead process said arrives when its successor is at work
            scene.start_again().await;
        }
        Mishap::KilledAfterLoms => {
            scene.has_order(round.user()).await;
            scene.kill().await;
            scene.start_again().await;
        }
        Mishap::KilledBeforeClosing => killed_before_closing(scene, round).await,
        Mishap::LomsAnswerLost => {
            scene.has_order(round.user()).await;
            scene.to_loms.cut();
            scene.to_loms.hold(Held::Nothing);
        }
        Mishap::AnswerLost => {
            eventually("it is closed", async || scene.is_closed(round.user()).await).await;
            scene.to_checkout.cut();
            scene.to_checkout.hold(Held::Nothing);
        }
        Mishap::CallerLeaves => scene.has_order(round.user()).await,
    }
}

/// The cart is locked, so that closing waits; then the process is killed.
async fn killed_before_closing(scene: &mut Scene, round: &Round) {
    scene.has_order(round.user()).await;
    let mut lock = scene.checkout.begin().await.unwrap();
    sqlx::query("SELECT id FROM checkout.cart WHERE user_id = $1 FOR UPDATE")
        .bind(round.user())
        .execute(&mut *lock)
        .await
        .unwrap();
    scene.to_loms.hold(Held::Nothing);
    let waits = "SELECT count(*) > 0 FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name LIKE 'checkout%' AND wait_event_type = 'Lock'";
    eventually("closing waits for the cart", async || {
        sqlx::query_scalar(waits)
            .fetch_one(&scene.checkout)
            .await
            .unwrap()
    })
    .await;
    scene.kill().await;
    lock.rollback().await.unwrap();
    scene.start_again().await;
}

/// After the mishap the user asks again until there is an outcome, and all is as it should be.
async fn settle(scene: &mut Scene, round: &Round, first: Result<i64, Status>) {
    // under a key what is added now belongs to no purchase yet; without one the next call might order it
    let added = if round.keyed {
        add_one(scene, round).await
    } else {
        0
    };
    if round.waits_for_worker {
        eventually("it is finished", async || {
            scene.is_closed(round.user()).await
        })
        .await;
        assert_eq!(scene.orders(round.user()).await.len(), 1);
    }
    let again = ask_again(scene, round).await;

    let orders = scene.orders(round.user()).await;
    let ids: Vec<_> = orders.iter().map(|(id, _)| Some(*id)).collect();
    assert_eq!(
        scene.purchases(round.user()).await,
        ids,
        "an order each, {orders:?}"
    );
    let in_cart = scene.in_cart(round.user()).await;
    if round.short {
        // without a key the lines that are back are tried again
        let most = if round.keyed { 1 } else { 2 };
        assert!(
            orders.len() <= most && orders.iter().all(|(_, status)| status == "failed"),
            "{orders:?}"
        );
        assert_eq!(in_cart, i64::from(IN_CART) + added);
        assert_eq!(reason(&again.unwrap_err()), "INSUFFICIENT_STOCK");
        return;
    }
    assert_eq!(orders, [(orders[0].0, "awaiting payment".to_owned())]);
    assert_eq!(in_cart, added);
    let was_told = first.is_ok() || matches!(round.mishap, Mishap::AnswerLost);
    match again {
        Ok(order) => assert_eq!(order, orders[0].0),
        Err(status) => {
            assert_eq!(reason(&status), "EMPTY_CART");
            assert!(was_told && !round.keyed, "{first:?}, then {status:?}");
        }
    }
    if let Ok(order) = first {
        assert_eq!(order, orders[0].0);
    }
}

/// One unit more, unless those that came back are as many as there are; how many.
async fn add_one(scene: &mut Scene, round: &Round) -> i64 {
    let request = AddToCartRequest {
        user: round.user(),
        sku: round.sku(),
        count: 1,
    };
    match scene.caller().add_to_cart(request).await {
        Ok(_) => 1,
        Err(status) => {
            assert_eq!(
                (reason(&status).as_str(), round.short),
                ("INSUFFICIENT_STOCK", true),
                "{status:?}"
            );
            0
        }
    }
}

/// Calls until it is over, as a client should.
async fn ask_again(scene: &mut Scene, round: &Round) -> Result<i64, Status> {
    for _ in 0..20 {
        match scene.caller().purchase(round.purchase()).await {
            Err(status) if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) => {}
            answer => return answer.map(|answer| answer.into_inner().order_id),
        }
    }
    panic!("no outcome of {round:?}");
}

#[tokio::test]
async fn whatever_happens_a_purchase_is_one_order() {
    let rounds: Vec<_> = (0..rounds()).map(Round::new).collect();
    let stock: Vec<_> = rounds.iter().map(|round| (1, round.sku(), UNITS)).collect();
    let mut scene = Scene::set(&stock).await;
    for round in &rounds {
        eprintln!("{round:?}");
        fill_cart(&mut scene, round).await;
        let first = mishap(&mut scene, round).await;
        settle(&mut scene, round, first).await;
    }
    scene.finish().await;
}
