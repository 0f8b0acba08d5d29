//! Callers who trade through everything: they place, pay, cancel and forget orders, and when the line breaks they ask
//! again, with the same key, whoever answers there next. What they were told is in a ledger, to be held against the tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, stream};
use proto::loms::{self as pb, loms_client::LomsClient};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use sqlx::PgPool;
use tokio::{sync::watch, task::JoinSet};
use tonic::{Code, Response, Status, transport::Channel};

use crate::{oracle, test_app::order};

const TRADERS: i64 = 24;
/// Each trader's users begin at a multiple of it: an order's user says whose it is, and no user has two.
const USERS: i64 = 1_000_000;
/// The longest that a trade may take, asking again included: far more than a restart.
const PATIENCE: Duration = Duration::from_secs(60);
/// What everybody wants and nobody has enough of.
const RARE: u32 = 99;

/// An order that somebody was told of.
struct Acknowledged {
    request: pb::CreateOrderRequest,
    id: i64,
    /// The status it must have when nothing is left to happen.
    ends: &'static str,
}

/// What was answered, and what was not.
#[derive(Default)]
pub(crate) struct Ledger {
    orders: Mutex<Vec<Acknowledged>>,
    deliveries: AtomicUsize,
    pub(crate) answers: AtomicUsize,
    /// Calls whose line broke before an answer came.
    pub(crate) unanswered: AtomicUsize,
}

/// The traders, and the line on which they reach the service.
pub(crate) struct Traders {
    pub(crate) ledger: Arc<Ledger>,
    line: watch::Sender<LomsClient<Channel>>,
    stop: watch::Sender<bool>,
    running: JoinSet<()>,
}

impl Traders {
    /// Begins to trade what [`stock`] has.
    pub(crate) fn start(seed: u64, first: LomsClient<Channel>) -> Traders {
        let (line, stop, mut running) = (
            watch::Sender::new(first),
            watch::Sender::new(false),
            JoinSet::new(),
        );
        let ledger = Arc::new(Ledger::default());
        for number in 0..TRADERS {
            let mut trader = Trader {
                line: line.subscribe(),
                ledger: ledger.clone(),
                chance: StdRng::seed_from_u64(seed.wrapping_add(number.cast_unsigned())),
            };
            let stop = stop.subscribe();
            running.spawn(async move {
                let mut user = number * USERS;
                while !*stop.borrow() {
                    user += 1;
                    let trade = tokio::time::timeout(PATIENCE, trader.trade(user)).await;
                    assert!(trade.is_ok(), "user {user} was never answered");
                }
            });
        }
        Traders {
            ledger,
            line,
            stop,
            running,
        }
    }

    /// Whoever serves from now on.
    pub(crate) fn reconnect(&self, client: LomsClient<Channel>) {
        self.line.send_replace(client);
    }

    /// Lets everybody finish, and asks for every order again by its key.
    pub(crate) async fn finish(self) -> Arc<Ledger> {
        self.stop.send_replace(true);
        self.running.join_all().await;
        let client = self.line.borrow().clone();
        let acknowledged = std::mem::take(&mut *self.ledger.orders.lock().expect("a ledger"));
        let keyed = acknowledged.iter().filter(|order| order.has_key());
        stream::iter(keyed)
            .for_each_concurrent(32, |order| {
                let mut client = client.clone();
                async move {
                    let again = client.create_order(order.request.clone()).await;
                    let again = again.expect("an order").into_inner();
                    assert_eq!(again.order_id, order.id, "{:?}", order.request);
                }
            })
            .await;
        *self.ledger.orders.lock().expect("a ledger") = acknowledged;
        self.ledger
    }
}

impl Acknowledged {
    fn has_key(&self) -> bool {
        !self.request.idempotency_key.is_empty()
    }
}

/// The lines of the delivery that the trade lives on: plenty of most, little of one.
pub(crate) fn stock() -> String {
    let plenty = (1..=6).flat_map(|sku| [format!("1,{sku},1000000\n"), format!("2,{sku},50\n")]);
    let lines: String = plenty.collect();
    format!("warehouse_id,sku,count\n{lines}3,{RARE},20\n")
}

struct Trader {
    line: watch::Receiver<LomsClient<Channel>>,
    ledger: Arc<Ledger>,
    chance: StdRng,
}

impl Trader {
    /// One try; `None`: nobody knows what became of it.
    async fn call<T>(
        &mut self,
        call: impl AsyncFnOnce(&mut LomsClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Option<Result<T, Status>> {
        let mut client = self.line.borrow_and_update().clone();
        let answer = call(&mut client).await.map(Response::into_inner);
        if let Err(status) = &answer
            && broken(status)
        {
            self.ledger.unanswered.fetch_add(1, Ordering::Relaxed);
            let next = self.line.changed();
            tokio::time::timeout(Duration::from_millis(200), next)
                .await
                .ok();
            return None;
        }
        self.ledger.answers.fetch_add(1, Ordering::Relaxed);
        Some(answer)
    }

    async fn trade(&mut self, user: i64) {
        if self.chance.random_ratio(1, 10) {
            self.deliver(user).await;
        }
        let mut items: Vec<(u32, u32)> = (0..self.chance.random_range(1..=3))
            .map(|_| {
                (
                    self.chance.random_range(1..=6),
                    self.chance.random_range(1..=4),
                )
            })
            .collect();
        if self.chance.random_ratio(1, 20) {
            items.push((RARE, 2));
        }
        let key = if self.chance.random_ratio(4, 5) {
            format!("key-{user}")
        } else {
            String::new()
        };
        let request = order(user, &items, &key);
        let placed = loop {
            match self
                .call(async |loms| loms.create_order(request.clone()).await)
                .await
            {
                Some(placed) => break placed.expect("an order"),
                // to ask again without a key would be another order
                None if key.is_empty() => return,
                None => {}
            }
        };
        let ends = match placed.status.as_str() {
            "failed" => "failed",
            "awaiting payment" => self.settle(placed.order_id).await,
            // a retry tells the present status: nobody paid, so the deadline has passed meanwhile
            "cancelled" => "cancelled",
            other => panic!("a new order is {other}"),
        };
        let (mut orders, id) = (
            self.ledger.orders.lock().expect("a ledger"),
            placed.order_id,
        );
        orders.push(Acknowledged { request, id, ends });
    }

    /// Pays, cancels or forgets an order; returns how it must end.
    async fn settle(&mut self, order_id: i64) -> &'static str {
        let does = self.chance.random_range(0..4);
        loop {
            let answer = match does {
                0 | 1 => {
                    let request = pb::OrderPayedRequest { order_id };
                    self.call(async |loms| loms.order_payed(request).await)
                        .await
                }
                2 => {
                    let request = pb::CancelOrderRequest { order_id };
                    self.call(async |loms| loms.cancel_order(request).await)
                        .await
                }
                _ => return "cancelled",
            };
            match answer {
                None => {}
                Some(Ok(_)) if does == 2 => return "cancelled",
                Some(Ok(_)) => return "payed",
                // too late, by the deadline or by the sweeper
                Some(Err(status)) if does < 2 && status.code() == Code::FailedPrecondition => {
                    return "cancelled";
                }
                Some(Err(status)) => panic!("order {order_id}: {status:?}"),
            }
        }
    }

    async fn deliver(&mut self, number: i64) {
        let line = |sku| pb::StockLine {
            warehouse_id: 2,
            sku,
            count: 3,
        };
        let request = pb::ReceiveStockRequest {
            delivery_id: format!("more-{number}"),
            lines: vec![line(1), line(2)],
        };
        loop {
            let answer = self
                .call(async |loms| loms.receive_stock(request.clone()).await)
                .await;
            if let Some(received) = answer {
                received.expect("a delivery");
                self.ledger.deliveries.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }
}

/// Whether a failure leaves open what happened: the line broke, perhaps in the middle of the answer, or the service says
/// that it does not know.
fn broken(status: &Status) -> bool {
    let answered = status.metadata().contains_key("x-trace-id") && status.source().is_none();
    let open = [
        Code::Unavailable,
        Code::DeadlineExceeded,
        Code::ResourceExhausted,
    ];
    !answered || open.contains(&status.code())
}

impl Ledger {
    /// Asserts that all that was acknowledged is in the tables, each order once and with the status that it must have.
    pub(crate) async fn assert_kept(&self, pool: &PgPool) {
        let found: Vec<(i64, i64, String)> = oracle::rows(
            pool,
            "SELECT id, user_id, status::text FROM loms.user_order",
        )
        .await;
        let users: BTreeSet<_> = found.iter().map(|(_, user, _)| user).collect();
        assert_eq!(users.len(), found.len(), "an order was placed twice");
        let orders: BTreeMap<_, _> = found
            .iter()
            .map(|(id, user, status)| (*id, (*user, status.as_str())))
            .collect();
        let acknowledged = {
            let acknowledged = self.orders.lock().expect("a ledger");
            for order in &*acknowledged {
                let expected = Some((order.request.user, order.ends));
                let there = orders.get(&order.id).copied();
                assert_eq!(there, expected, "order {}", order.id);
            }
            acknowledged.len()
        };
        let unacknowledged = orders.len() - acknowledged;
        let unanswered = self.unanswered.load(Ordering::Relaxed);
        assert!(
            unacknowledged <= unanswered,
            "{unacknowledged} orders of nobody"
        );
        // each was asked for until it was answered
        let deliveries = self.deliveries.load(Ordering::Relaxed) as i64;
        let booked = "SELECT count(*) FROM loms.delivery WHERE id LIKE 'more-%'";
        assert_eq!(oracle::count(pool, booked).await, deliveries, "deliveries");
        println!(
            "{acknowledged} orders acknowledged, {unacknowledged} made that nobody was told of, {deliveries} deliveries, \
             {unanswered} calls without an answer"
        );
    }
}
