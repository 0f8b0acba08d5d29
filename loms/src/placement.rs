//! CreateOrder. Every order waits for a flush of the log and for the rows it shares with others, so orders are placed
//! many at a time: handlers queue, one placer takes what is waiting and writes it in one transaction. It never waits for
//! more: an idle system answers one order as fast as it can.

use std::{
    collections::{BTreeSet, HashMap},
    panic::AssertUnwindSafe,
    sync::LazyLock,
    time::Duration,
};

use futures::FutureExt as _;
use platform::{
    grpc::{Deadline, registered},
    pg::{self, Failure},
    tasks::Tasks,
};
use prometheus::{Histogram, HistogramOpts, IntGauge};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{mpsc, oneshot};

use crate::{
    allocation::{Allocation, Shortage},
    config::OrdersConfig,
    error::Error,
    order::{Event, Lines, OrderId, Sku, Status, UserId},
    orders::count_transition,
    outbox::Relay,
    store::placement::{self as store, DecidedOrder, KeyClaim},
};

/// An order that somebody wants.
#[derive(Clone, Debug)]
pub(crate) struct NewOrder {
    pub(crate) user: UserId,
    pub(crate) lines: Lines,
    pub(crate) key: Option<IdempotencyKey>,
    /// Trace context of the call, kept with its events.
    pub(crate) traceparent: Option<String>,
}

/// A caller's key, and the hash of what it asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct IdempotencyKey {
    pub(crate) key: String,
    pub(crate) body_hash: [u8; 32],
}

/// What became of it.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub(crate) order: OrderId,
    /// For a replayed key the order's present status.
    pub(crate) status: Status,
    pub(crate) shortages: Vec<Shortage>,
}

struct Waiting {
    order: NewOrder,
    deadline: Deadline,
    reply: oneshot::Sender<Result<Placed, Error>>,
}

/// The way into the placer's queue.
#[derive(Clone)]
pub(crate) struct Placements(mpsc::Sender<Waiting>);

impl Placements {
    /// Starts the placer, which has a connection of its own, and returns the way in.
    pub(crate) fn start(
        pool: PgPool,
        config: OrdersConfig,
        relay: Relay,
        tasks: &Tasks,
    ) -> Placements {
        let (sender, queue) = mpsc::channel(config.queue.max(1));
        let stopping = tasks.stopping();
        let mut placer = Placer {
            pool,
            config,
            relay,
            queue,
            carried: None,
        };
        tasks.worker("placer", async move {
            tokio::select! {
                () = placer.run() => {}
                () = stopping.cancelled() => {}
            }
            Ok(())
        });
        Placements(sender)
    }

    /// Places an order, or makes it `failed` when stock is short: both are answers, not errors.
    pub(crate) async fn place(&self, order: NewOrder, deadline: Deadline) -> Result<Placed, Error> {
        let (reply, answer) = oneshot::channel();
        self.0
            .try_send(Waiting {
                order,
                deadline,
                reply,
            })
            .map_err(|_| Error::Busy)?;
        METRICS
            .queue
            .set((self.0.max_capacity() - self.0.capacity()) as i64);
        // the placer is gone only when the process stops
        answer.await.unwrap_or(Err(Error::Away))
    }
}

struct Placer {
    pool: PgPool,
    config: OrdersConfig,
    relay: Relay,
    queue: mpsc::Receiver<Waiting>,
    /// The order that did not fit into the last batch.
    carried: Option<Waiting>,
}

impl Placer {
    async fn run(&mut self) {
        while let Some(batch) = self.next_batch().await {
            self.place(batch).await;
        }
    }

    /// What is waiting, up to the bounds. Orders that nobody waits for any more are dropped here, before they cost.
    async fn next_batch(&mut self) -> Option<Vec<Waiting>> {
        let mut next = match self.carried.take() {
            Some(waiting) => Some(waiting),
            None => Some(self.queue.recv().await?),
        };
        let (mut batch, mut lines) = (Vec::new(), 0);
        while let Some(waiting) = next {
            if waiting.deadline.passed() {
                waiting.reply.send(Err(Error::Late)).ok();
            } else if !waiting.reply.is_closed() {
                lines += waiting.order.lines.len();
                if !batch.is_empty() && lines > self.config.batch_lines {
                    self.carried = Some(waiting);
                    break;
                }
                batch.push(waiting);
            }
            next = if batch.len() < self.config.batch_orders {
                self.queue.try_recv().ok()
            } else {
                None
            };
        }
        METRICS.queue.set(self.queue.len() as i64);
        Some(batch)
    }

    async fn place(&self, batch: Vec<Waiting>) {
        if batch.is_empty() {
            return;
        }
        METRICS.batch.observe(batch.len() as f64);
        let (orders, replies): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .map(|waiting| (waiting.order, waiting.reply))
            .unzip();
        let answers = match AssertUnwindSafe(self.place_orders(&orders))
            .catch_unwind()
            .await
        {
            Ok(answers) => answers,
            Err(_) => orders.iter().map(|_| Err(Error::Broken)).collect(),
        };
        self.relay.wake();
        for (reply, answer) in replies.into_iter().zip(answers) {
            reply.send(answer).ok();
        }
    }

    async fn place_orders(&self, orders: &[NewOrder]) -> Vec<Result<Placed, Error>> {
        let mut outcome = self.place_together(orders).await;
        if outcome
            .as_ref()
            .is_err_and(|error| pg::classify(error) == Failure::Retry)
        {
            outcome = self.place_together(orders).await;
        }
        let error = match outcome {
            Ok(answers) => return answers,
            Err(error) => error,
        };
        tracing::error!(error = %error, orders = orders.len(), "batch failed");
        match pg::classify(&error) {
            // one order hurts a constraint: alone it hurts only itself
            Failure::Data if orders.len() > 1 => {
                let mut answers = Vec::with_capacity(orders.len());
                for order in orders {
                    answers.extend(
                        match self.place_together(std::slice::from_ref(order)).await {
                            Ok(answers) => answers,
                            Err(error) => vec![Err(Error::Database(error))],
                        },
                    );
                }
                answers
            }
            // what became of the commit is unknown: only a key makes a retry safe, and that is the caller's
            Failure::Away | Failure::Retry => orders.iter().map(|_| Err(Error::Away)).collect(),
            Failure::Data | Failure::Bug => orders.iter().map(|_| Err(Error::Broken)).collect(),
        }
    }

    async fn place_together(
        &self,
        orders: &[NewOrder],
    ) -> sqlx::Result<Vec<Result<Placed, Error>>> {
        let mut tx = self.pool.begin().await?;
        let answers = place_batch(&mut tx, orders, self.config.payment_timeout).await?;
        tx.commit().await?;
        for (winner, placed) in answers
            .iter()
            .filter_map(|(winner, answer)| Some((winner, answer.as_ref().ok()?)))
        {
            if *winner {
                count_transition(Status::New, 1);
                count_transition(placed.status, 1);
            }
        }
        Ok(answers.into_iter().map(|(_, answer)| answer).collect())
    }
}

type Answer = (bool, Result<Placed, Error>);

/// One transaction for many orders: numbers, keys, locks, allocation in order of arrival, writes. Answers in the order
/// of `orders`, each with whether this transaction made the order.
async fn place_batch(
    db: &mut PgConnection,
    orders: &[NewOrder],
    payment_timeout: Duration,
) -> sqlx::Result<Vec<Answer>> {
    let ids = store::draw_order_ids(db, orders.len()).await?;
    let owners = claim_keys(db, orders, &ids).await?;
    let made = make_orders(db, orders, &ids, &owners, payment_timeout).await?;

    let earlier: Vec<OrderId> = owners
        .iter()
        .filter_map(|owner| owner.order())
        .filter(|order| !made.contains_key(order))
        .collect();
    let (statuses, shortages) = if earlier.is_empty() {
        Default::default()
    } else {
        (
            store::read_statuses(db, &earlier).await?,
            store::read_shortages(db, &earlier).await?,
        )
    };
    Ok(owners
        .into_iter()
        .zip(&ids)
        .map(|(owner, id)| match owner {
            Owner::Reused => (false, Err(Error::KeyReused)),
            Owner::Order(order) => match made.get(&order) {
                Some(placed) => (order == *id, Ok(placed.clone())),
                None => {
                    let status = statuses.get(&order).copied();
                    let shortages = shortages.get(&order).cloned().unwrap_or_default();
                    (
                        false,
                        status
                            .map(|status| Placed {
                                order,
                                status,
                                shortages,
                            })
                            .ok_or(Error::Broken),
                    )
                }
            },
        })
        .collect())
}

/// Which order answers a request.
#[derive(Clone, Copy)]
enum Owner {
    Order(OrderId),
    /// The key stands for another request.
    Reused,
}

impl Owner {
    fn order(self) -> Option<OrderId> {
        match self {
            Owner::Order(order) => Some(order),
            Owner::Reused => None,
        }
    }
}

/// How often a key may be swept between the claim and the look at its owner; once is already unlikely.
const CLAIM_ROUNDS: usize = 3;

/// Claims the keys of a batch. Equal keys are folded: the first order of a batch owns, the others answer from it.
async fn claim_keys(
    db: &mut PgConnection,
    orders: &[NewOrder],
    ids: &[OrderId],
) -> sqlx::Result<Vec<Owner>> {
    let mut firsts: HashMap<(UserId, &str), usize> = HashMap::new();
    for (index, order) in orders.iter().enumerate() {
        if let Some(key) = &order.key {
            firsts
                .entry((order.user, key.key.as_str()))
                .or_insert(index);
        }
    }
    let mut known: HashMap<(UserId, String), (OrderId, Vec<u8>)> = HashMap::new();
    for _ in 0..CLAIM_ROUNDS {
        let open: Vec<(UserId, &str, usize)> = firsts
            .iter()
            .filter(|((user, key), _)| !known.contains_key(&(*user, (*key).to_owned())))
            .map(|((user, key), index)| (*user, *key, *index))
            .collect();
        if open.is_empty() {
            break;
        }
        claim_open_keys(db, orders, ids, &open, &mut known).await?;
    }
    orders
        .iter()
        .zip(ids)
        .map(|(order, id)| {
            let Some(key) = &order.key else {
                return Ok(Owner::Order(*id));
            };
            let (owner, hash) = known
                .get(&(order.user, key.key.clone()))
                .ok_or_else(|| sqlx::Error::Protocol("a key was neither free nor taken".into()))?;
            Ok(if hash == &key.body_hash {
                Owner::Order(*owner)
            } else {
                Owner::Reused
            })
        })
        .collect()
}

async fn claim_open_keys(
    db: &mut PgConnection,
    orders: &[NewOrder],
    ids: &[OrderId],
    open: &[(UserId, &str, usize)],
    known: &mut HashMap<(UserId, String), (OrderId, Vec<u8>)>,
) -> sqlx::Result<()> {
    let hash = |index: usize| {
        orders[index]
            .key
            .as_ref()
            .map_or(&[][..], |key| &key.body_hash)
    };
    let claims: Vec<_> = open
        .iter()
        .map(|&(user, key, index)| KeyClaim {
            user,
            key,
            body_hash: hash(index),
            order: ids[index],
        })
        .collect();
    let won: BTreeSet<(UserId, String)> =
        store::claim_keys(db, &claims).await?.into_iter().collect();
    let mut lost = Vec::new();
    for &(user, key, index) in open {
        let name = (user, key.to_owned());
        if won.contains(&name) {
            known.insert(name, (ids[index], hash(index).to_vec()));
        } else {
            lost.push((user, key));
        }
    }
    if !lost.is_empty() {
        let owners = store::read_key_owners(db, &lost).await?;
        known.extend(
            owners
                .into_iter()
                .map(|(name, owner)| (name, (owner.order, owner.body_hash))),
        );
    }
    Ok(())
}

/// Decides and writes the orders that own themselves.
async fn make_orders(
    db: &mut PgConnection,
    orders: &[NewOrder],
    ids: &[OrderId],
    owners: &[Owner],
    payment_timeout: Duration,
) -> sqlx::Result<HashMap<OrderId, Placed>> {
    let own: Vec<(OrderId, &NewOrder)> = ids
        .iter()
        .zip(orders)
        .zip(owners)
        .filter(|((id, _), owner)| owner.order() == Some(**id))
        .map(|((id, order), _)| (*id, order))
        .collect();
    if own.is_empty() {
        return Ok(HashMap::new());
    }
    let skus: BTreeSet<Sku> = own
        .iter()
        .flat_map(|(_, order)| order.lines.iter().map(|(sku, _)| sku))
        .collect();
    let mut shelves = store::lock_shelves(db, &skus.into_iter().collect::<Vec<_>>()).await?;

    let (mut decided, mut taken, mut short) =
        (Vec::new(), Vec::<(OrderId, Allocation)>::new(), Vec::new());
    let mut made = HashMap::new();
    for (id, order) in own {
        let (event, shortages) = match shelves.allocate(&order.lines) {
            Ok(parts) => {
                taken.extend(parts.into_iter().map(|part| (id, part)));
                (Event::Reserve, Vec::new())
            }
            Err(shortages) => {
                short.extend(shortages.iter().map(|shortage| (id, *shortage)));
                (Event::Reject, shortages)
            }
        };
        // a new order may be reserved or rejected: the table of statuses has both
        let status = Status::New
            .apply(event)
            .map_err(|_| sqlx::Error::Protocol("illegal placement".into()))?;
        let traceparent = order.traceparent.as_deref();
        decided.push(DecidedOrder {
            id,
            user: order.user,
            status,
            lines: &order.lines,
            traceparent,
        });
        made.insert(
            id,
            Placed {
                order: id,
                status,
                shortages,
            },
        );
    }
    store::insert_orders(db, &decided, payment_timeout).await?;
    if !taken.is_empty() {
        store::reserve(db, &taken).await?;
    }
    if !short.is_empty() {
        store::insert_shortages(db, &short).await?;
    }
    Ok(made)
}

struct Metrics {
    batch: Histogram,
    queue: IntGauge,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| Metrics {
    batch: registered(Histogram::with_opts(
        HistogramOpts::new(
            "loms_placement_batch_orders",
            "Orders placed by one transaction.",
        )
        .buckets(vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]),
    )),
    queue: registered(IntGauge::new(
        "loms_placement_queue_orders",
        "Orders that wait for the placer.",
    )),
});
