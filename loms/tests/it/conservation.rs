//! A shop at its busiest: everybody orders, pays, cancels and forgets at once, two processes serve them, and at every
//! moment each unit is where the books say.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures::future::join_all;
use proto::loms::CreateOrderRequest;
use rand::{
    Rng as _, SeedableRng as _,
    distr::{Distribution as _, weighted::WeightedIndex},
    rngs::StdRng,
};
use serde_json::json;
use sqlx::PgPool;
use tonic::{Code, Status};

use crate::{
    oracle::{self, no_deadlocks, rows},
    test_app::{TestApp, eventually, order, scale, seed},
};

const CALLERS: u64 = 64;
const SKUS: u32 = 20;
const WAREHOUSES: i64 = 3;

/// The shop, and what its callers were told; they share a thread.
struct Shop {
    apps: [TestApp; 2],
    /// The nth best seller is asked for 1/n as often as the best.
    popularity: WeightedIndex<f64>,
    told: RefCell<Told>,
}

/// `(warehouse, SKU, units)` of a delivery.
type Shelves = Vec<(i64, u32, u64)>;

#[derive(Default)]
struct Told {
    /// Every order, with the status that its caller was told last.
    orders: BTreeMap<i64, String>,
    /// Newest last, to pick from.
    ids: Vec<i64>,
    /// Requests with a key, and their orders.
    keyed: Vec<(CreateOrderRequest, i64)>,
    deliveries: Vec<(String, Shelves)>,
}

impl Shop {
    fn lines(&self, rng: &mut StdRng) -> Vec<(u32, u32)> {
        let lines = 0..rng.random_range(1..=3);
        lines
            .map(|_| {
                let sku = 1 + self.popularity.sample(rng) as u32;
                (sku, rng.random_range(1..=3))
            })
            .collect()
    }

    /// One of the newest orders: somebody else may be at it too, and its deadline is near.
    fn any_order(&self, rng: &mut StdRng) -> Option<i64> {
        let told = self.told.borrow();
        let newest = told.ids.len().saturating_sub(100);
        let newest = &told.ids[newest..];
        (!newest.is_empty()).then(|| newest[rng.random_range(0..newest.len())])
    }

    /// What one caller does until the time is over.
    async fn call(&self, caller: u64, seed: u64, until: Instant) {
        let rng = &mut StdRng::seed_from_u64(seed.wrapping_add(caller));
        let user = 1 + caller as i64;
        for n in 0.. {
            if Instant::now() >= until {
                return;
            }
            let app = &self.apps[rng.random_range(0..2)];
            match rng.random_range(0..100) {
                0..25 => self.create(app, order(user, &self.lines(rng), "")).await,
                25..45 => {
                    let keyed = order(user, &self.lines(rng), &format!("key-{n}"));
                    self.create(app, keyed).await;
                }
                45..52 => self.replay(app, rng).await,
                52..75 => self.pay(app, rng).await,
                75..90 => self.cancel(app, rng).await,
                _ => {
                    self.receive(app, rng, format!("delivery-{caller}-{n}"))
                        .await
                }
            }
        }
    }

    async fn create(&self, app: &TestApp, request: CreateOrderRequest) {
        let placed = app.try_create(request.clone()).await.expect("an order");
        assert!(["awaiting payment", "failed"].contains(&placed.status.as_str()));
        let told = &mut *self.told.borrow_mut();
        told.ids.push(placed.order_id);
        // somebody may have payed it meanwhile
        told.orders.entry(placed.order_id).or_insert(placed.status);
        if !request.idempotency_key.is_empty() {
            told.keyed.push((request, placed.order_id));
        }
    }

    async fn replay(&self, app: &TestApp, rng: &mut StdRng) {
        let keyed = {
            let told = self.told.borrow();
            let any = rng.random_range(0..told.keyed.len().max(1));
            told.keyed.get(any).cloned()
        };
        if let Some((request, id)) = keyed {
            assert_eq!(
                app.try_create(request).await.expect("an order").order_id,
                id
            );
        }
    }

    async fn pay(&self, app: &TestApp, rng: &mut StdRng) {
        if let Some(id) = self.any_order(rng) {
            self.settled(id, "payed", app.pay(id).await);
        }
    }

    async fn cancel(&self, app: &TestApp, rng: &mut StdRng) {
        if let Some(id) = self.any_order(rng) {
            self.settled(id, "cancelled", app.cancel(id).await);
        }
    }

    fn settled(&self, id: i64, status: &str, answer: Result<(), Status>) {
        match answer {
            Ok(()) => {
                let told = &mut *self.told.borrow_mut();
                let before = told.orders.insert(id, status.into());
                let before = before.expect("an order");
                assert!(
                    [status, "awaiting payment"].contains(&before.as_str()),
                    "{id}: {before}"
                );
            }
            Err(refused) => assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}"),
        }
    }

    async fn receive(&self, app: &TestApp, rng: &mut StdRng, id: String) {
        let before = {
            let told = self.told.borrow();
            let again = rng.random_bool(0.2) && !told.deliveries.is_empty();
            again.then(|| told.deliveries[rng.random_range(0..told.deliveries.len())].clone())
        };
        if let Some((id, lines)) = before {
            assert!(app.receive(&id, &lines).await.expect("a delivery"));
            return;
        }
        let wanted = self.lines(rng);
        let lines: Vec<_> = wanted
            .into_iter()
            .map(|(sku, units)| (rng.random_range(1..=WAREHOUSES), sku, units.into()))
            .collect();
        assert!(!app.receive(&id, &lines).await.expect("a delivery"));
        self.told.borrow_mut().deliveries.push((id, lines));
    }
}

const UNPAID: &str = "SELECT count(*) FROM loms.unpaid_order";

#[tokio::test]
async fn units_are_conserved_at_every_moment() {
    let pool = crate::database().await;
    let seed = seed();
    let orders = json!({"payment_timeout": "1s"});
    let app = TestApp::start(&pool, json!({"orders": orders})).await;
    let replica = json!({"orders": orders, "kafka": {"topic": app.topic}});
    let apps = [TestApp::start(&pool, replica).await, app];
    let stock: Vec<_> = (1..=SKUS)
        .flat_map(|sku| (1..=WAREHOUSES).map(move |warehouse| (warehouse, sku, 8)))
        .collect();
    apps[0].receive("opening", &stock).await.unwrap();
    let weights = (1..=SKUS).map(|rank| 1.0 / f64::from(rank));
    let shop = Shop {
        apps,
        popularity: WeightedIndex::new(weights).expect("weights"),
        told: RefCell::default(),
    };
    let until = Instant::now() + Duration::from_secs(4) * scale() as u32;
    let callers = join_all((0..CALLERS).map(|caller| shop.call(caller, seed, until)));
    let audits = async {
        let mut audits = 0;
        while Instant::now() < until {
            let report = loms::audit(&shop.apps[0].config).await.expect("an audit");
            assert!(report.differences.is_empty(), "while it runs: {report}");
            audits += 1;
        }
        audits
    };
    let (audits, _) = tokio::join!(audits, callers);
    assert!(audits >= 5, "{audits}");
    eventually("the last deadlines", async || {
        oracle::count(&pool, UNPAID).await == 0
    })
    .await;
    let Shop { apps, told, .. } = shop;
    check_told(&pool, &told.into_inner().orders).await;
    let [replica, app] = apps;
    replica.stop().await.unwrap();
    app.finish().await;
    no_deadlocks(&pool).await;
}

/// Everybody was told the truth, and nobody was left without an answer; every way to end was taken.
async fn check_told(pool: &PgPool, told: &BTreeMap<i64, String>) {
    let ends: Vec<(i64, String, String)> = rows(
        pool,
        "SELECT o.id, o.status::text, h.actor FROM loms.user_order o
         JOIN LATERAL (SELECT actor FROM loms.status_change WHERE order_id = o.id
                       ORDER BY sequence DESC LIMIT 1) AS h ON true",
    )
    .await;
    assert_eq!(ends.len(), told.len(), "orders that nobody was told of");
    let mut ways: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for (id, status, actor) in &ends {
        let forgotten = (told[id].as_str(), actor.as_str()) == ("awaiting payment", "timeout");
        assert!(
            told[id] == *status || forgotten,
            "{id} is {status}, told {}",
            told[id]
        );
        *ways.entry((status, actor)).or_default() += 1;
    }
    println!("{} orders: {ways:?}", ends.len());
    let expected = [
        ("cancelled", "timeout"),
        ("cancelled", "user"),
        ("failed", "user"),
        ("payed", "user"),
    ];
    assert!(ways.keys().eq(&expected), "{ways:?}");
}
