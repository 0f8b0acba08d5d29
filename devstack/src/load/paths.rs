//! Every path of LOMS, the rare ones too, so that the plan of each of its statements is seen with many orders in the
//! tables: replays and misuse of keys, stock that is short or held by somebody, payments of long ago, both sweeps, both
//! audits.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use futures::future::join_all;
use pbjson_types::Timestamp;
use proto::loms::{
    AbandonOrderRequest, CancelOrderRequest, CreateOrderRequest, OrderItem, OrderPayedRequest,
    loms_client::LomsClient,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use tonic::{Code, transport::Channel};

use super::{
    Plan,
    calls::{self, Prepared},
    measure::Caller,
    orders::prepare,
    plans::{Cost, Plans},
    target::{Target, until_none},
};

/// Calls of each kind.
const CALLS: usize = 640;
/// Orders that are made for them: enough to choose from, and few enough to be swept soon.
const ORDERS: usize = 5_000;
/// How many calls at once.
const AT_ONCE: usize = 64;
/// A SKU of the delivery of this load, and more units than it brings.
const RARE: u32 = 1;
const TOO_MANY: u32 = 60_000;
/// More than one sweep of keys deletes.
const OLD_KEYS: i64 = 3_000;
/// The longest that a worker sleeps, and the time-out of a lock before it.
const BOUND: Duration = Duration::from_secs(30);
/// Before them, another load may have left a few hundred thousand orders.
const SWEEP_BOUND: Duration = Duration::from_secs(600);

/// Goes every path but that of the audit, which comes after every load. Workers that would come by once in minutes come by
/// at once.
pub(super) async fn walk(plan: &Plan, target: &mut Target) -> Result<Watched> {
    let often = json!({"keys": {"sweep_every": "1s"}, "audit": {"every": "1s"}});
    target.reconfigure(&often).await?;
    let mut db = target
        .admin()
        .await?
        .context("the paths need a stack of its own")?;
    let mut plans = Plans::start(&mut db).await?;
    let few = Plan {
        prepared: plan.prepared.min(ORDERS),
        ..plan.clone()
    };
    let new = prepare(&few, target).await?;
    let old = Prepared::filled(plan.filled);
    let walker = Walker {
        loms: target.loms()(0),
        plan,
    };
    deliver_twice(target).await?;
    walker.keys().await?;
    walker.abandon().await?;
    walker.look(&[&new, &old]).await?;
    walker.pay(&[&new, &old]).await?;
    walker.cancel(&new).await?;
    let holder = target.database().await?.context("no database")?;
    walker.meet_held_stock(&mut db, holder, &mut plans).await?;
    let aged = "UPDATE loms.idempotency_key SET created_at = now() - interval '8 days'
                WHERE ctid = ANY (ARRAY(SELECT ctid FROM loms.idempotency_key LIMIT $1))";
    sqlx::query(aged).bind(OLD_KEYS).execute(&mut db).await?;
    // each of them gives the relay's lease back when it stops; the next writes its partitioner
    // down, as after an upgrade
    let before = "UPDATE loms.relay SET partitioner = NULL";
    sqlx::query(before).execute(&mut db).await?;
    target.reconfigure(&often).await?;
    Ok(Watched { db, plans })
}

/// Statements that are watched.
pub(super) struct Watched {
    db: PgConnection,
    plans: Plans,
}

impl Watched {
    /// What each of them did; it waits for the workers that come by now and then.
    pub(super) async fn finish(mut self) -> Result<Vec<Cost>> {
        self.plans.finish(&mut self.db, BOUND).await
    }
}

struct Walker<'a> {
    loms: LomsClient<Channel>,
    plan: &'a Plan,
}

impl Walker<'_> {
    /// An order and one that fails for want of stock, each again with its key, and with another's body.
    async fn keys(&self) -> Result<()> {
        for count in [1, TOO_MANY] {
            let request = self.order(RARE, count, "path");
            let first = self.create(request.clone()).await?;
            let again = self.create(request.clone()).await?;
            ensure!(first == again, "a replay made another order");
            let mut other = request;
            other.items[0].count += 1;
            let refused = self.loms.clone().create_order(other).await;
            let refused = refused.err().context("a key was used for two orders")?;
            ensure!(refused.code() == Code::InvalidArgument, "{refused}");
        }
        Ok(())
    }

    /// A key that has made an order, and one that makes none any more.
    async fn abandon(&self) -> Result<()> {
        self.create(self.order(RARE, 1, "given-up")).await?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
        for key in ["given-up-1", "never-tried"] {
            let request = AbandonOrderRequest {
                user: 1,
                idempotency_key: key.to_owned(),
                first_tried_at: Some(Timestamp {
                    seconds: since.as_secs().cast_signed(),
                    nanos: 0,
                }),
            };
            self.loms.clone().abandon_order(request).await?;
        }
        Ok(())
    }

    fn order(&self, sku: u32, count: u32, key: &str) -> CreateOrderRequest {
        CreateOrderRequest {
            user: 1,
            items: vec![OrderItem { sku, count }],
            idempotency_key: format!("{key}-{count}"),
        }
    }

    async fn create(&self, request: CreateOrderRequest) -> Result<i64> {
        let placed = self.loms.clone().create_order(request).await?;
        Ok(placed.into_inner().order_id)
    }

    /// Orders of now and of long ago, and stock.
    async fn look(&self, orders: &[&Prepared]) -> Result<()> {
        let mut caller = Caller {
            index: 0,
            random: StdRng::seed_from_u64(1),
        };
        let mut client = self.loms.clone();
        for _ in 0..CALLS {
            for orders in orders {
                let answer = calls::list_order(&mut client, orders, &mut caller).await;
                ensure!(answer.is_none_or(|answer| answer == "OK"), "ListOrder");
            }
            let answer = calls::stocks(&mut client, &self.plan.skus, &mut caller).await;
            ensure!(answer == "OK", "Stocks: {answer}");
        }
        Ok(())
    }

    /// In batches: those that wait for it, then those that were payed long ago and are in no memory.
    async fn pay(&self, orders: &[&Prepared]) -> Result<()> {
        let mut random = StdRng::seed_from_u64(2);
        for orders in orders.iter().cycle().take(CALLS / AT_ONCE * orders.len()) {
            let payments = (0..AT_ONCE).filter_map(|_| orders.any(&mut random));
            let payments = payments.map(|order_id| {
                let mut client = self.loms.clone();
                async move { client.order_payed(OrderPayedRequest { order_id }).await }
            });
            for payed in join_all(payments).await {
                expect_settled(payed)?;
            }
        }
        Ok(())
    }

    async fn cancel(&self, orders: &Prepared) -> Result<()> {
        let mut random = StdRng::seed_from_u64(3);
        for _ in 0..AT_ONCE {
            let Some(order_id) = orders.any(&mut random) else {
                break;
            };
            let request = CancelOrderRequest { order_id };
            expect_settled(self.loms.clone().cancel_order(request).await)?;
        }
        Ok(())
    }

    /// Somebody sits on a row of stock while an order wants it, and while orders fall due that hold units of it.
    async fn meet_held_stock(
        &self,
        db: &mut PgConnection,
        mut holder: PgConnection,
        plans: &mut Plans,
    ) -> Result<()> {
        let mut held = holder.begin().await?;
        let sku: i64 = sqlx::query_scalar(
            "SELECT sku FROM loms.stock WHERE (sku, warehouse_id) = (SELECT sku, warehouse_id FROM loms.reservation_stock LIMIT 1)
             FOR NO KEY UPDATE",
        )
        .fetch_one(&mut *held)
        .await?;
        let request = self.order(u32::try_from(sku)?, 1, "held");
        let refused = self.loms.clone().create_order(request).await;
        let refused = refused.err().context("held stock was sold")?;
        ensure!(refused.code() == Code::Unavailable, "{refused}");
        sqlx::query("UPDATE loms.unpaid_order SET payment_deadline = clock_timestamp()")
            .execute(&mut *db)
            .await?;
        plans
            .wait_for(db, "orders::lock_due_orders_on", BOUND)
            .await?;
        held.rollback().await?;
        let unpaid = "SELECT count(*) FROM loms.unpaid_order";
        until_none(db, unpaid, SWEEP_BOUND)
            .await?
            .context("orders never expired")?;
        Ok(())
    }
}

/// Done, or refused because the order was settled before.
fn expect_settled<T>(answer: Result<T, tonic::Status>) -> Result<()> {
    match answer {
        Err(status) if status.code() != Code::FailedPrecondition => Err(status.into()),
        _ => Ok(()),
    }
}

/// A delivery, and the same file once more.
async fn deliver_twice(target: &Target) -> Result<()> {
    let stack = target.stack().context("no stack")?;
    let mut csv = "warehouse_id,sku,count\n".to_owned();
    let mut random = StdRng::seed_from_u64(4);
    for sku in RARE..=1_000 {
        writeln!(csv, "1,{sku},{}", random.random_range(1..10))?;
    }
    let file = stack.dir().join("again.csv");
    std::fs::write(&file, csv).context("write the delivery")?;
    stack.receive_stock(&file).await?;
    stack.receive_stock(&file).await?;
    Ok(())
}
