//! Orders that exist: shown, payed, cancelled.

use std::sync::LazyLock;

use platform::{grpc::registered, pool::Pool};
use prometheus::{IntCounterVec, Opts};
use sqlx::{Connection as _, PgConnection};

use crate::{
    crash::CrashPoint,
    error::Error,
    order::{Actor, Event, OrderId, Status},
    outbox::Relay,
    store::orders::{self as store, OrderRow},
};

/// The order as it is now.
pub(crate) async fn list(pool: &Pool, order: OrderId) -> Result<OrderRow, Error> {
    let read = async |db: &mut PgConnection| store::read_order(db, order).await;
    pool.round(read).await?.ok_or(Error::OrderUnknown(order))
}

/// Payment has arrived: the reservation is written off. Again is no change.
pub(crate) async fn pay(
    pool: &Pool,
    relay: &Relay,
    order: OrderId,
    traceparent: Option<&str>,
) -> Result<(), Error> {
    change(pool, relay, order, Event::Pay, traceparent).await
}

/// The user does not want it any more: the units are back on sale. Again is no change.
pub(crate) async fn cancel(
    pool: &Pool,
    relay: &Relay,
    order: OrderId,
    traceparent: Option<&str>,
) -> Result<(), Error> {
    change(pool, relay, order, Event::Cancel, traceparent).await
}

async fn change(
    pool: &Pool,
    relay: &Relay,
    order: OrderId,
    event: Event,
    traceparent: Option<&str>,
) -> Result<(), Error> {
    let write = async |db: &mut PgConnection| write_change(db, order, event, traceparent).await;
    if let Some(to) = pool.round(write).await? {
        count_transition(to, 1);
        relay.wake();
    }
    Ok(())
}

/// The transaction of [`change`]. `None`: the order was there already, nothing is written.
async fn write_change(
    db: &mut PgConnection,
    order: OrderId,
    event: Event,
    traceparent: Option<&str>,
) -> Result<Option<Status>, Error> {
    let mut tx = db.begin().await?;
    let status = store::lock_order(&mut tx, order)
        .await?
        .ok_or(Error::OrderUnknown(order))?;
    let to = status.apply(event).map_err(|_| Error::Illegal {
        order,
        status,
        event,
    })?;
    if to == status {
        return Ok(None);
    }
    settle(&mut tx, &[order], event, traceparent)
        .await?
        .ok_or(Error::PaymentLate(order))?;
    CrashPoint::OrderSettling.pass();
    tx.commit().await?;
    CrashPoint::OrderSettled.pass();
    Ok(Some(to))
}

/// Ends the wait for payment of orders that the transaction has locked and seen awaiting: stock, status, history and
/// event. Returns their status; `None`: payment came after the deadline, nothing may be committed.
pub(crate) async fn settle(
    db: &mut PgConnection,
    orders: &[OrderId],
    event: Event,
    traceparent: Option<&str>,
) -> sqlx::Result<Option<Status>> {
    let to = Status::AwaitingPayment
        .apply(event)
        .map_err(|_| sqlx::Error::Protocol(format!("{event:?} does not end a wait for payment")))?;
    let in_time_only = event == Event::Pay;
    let waits = store::end_payment_wait(db, orders, in_time_only).await?;
    if waits != orders.len() as u64 {
        return if in_time_only {
            Ok(None)
        } else {
            Err(lost_rows("deadlines", orders.len(), waits))
        };
    }
    if to == Status::Payed {
        store::write_off(db, orders).await?;
    } else {
        store::release(db, orders).await?;
    }
    let actor = if event == Event::Expire {
        Actor::Timeout
    } else {
        Actor::User
    };
    let settled = store::settle(db, orders, to, actor, traceparent).await?;
    if settled == orders.len() as u64 {
        Ok(Some(to))
    } else {
        Err(lost_rows("orders", orders.len(), settled))
    }
}

fn lost_rows(what: &str, wanted: usize, found: u64) -> sqlx::Error {
    sqlx::Error::Protocol(format!("{wanted} {what} are locked and {found} changed"))
}

/// Shows what is counted before there is anything to count.
pub(crate) fn show_metrics() {
    LazyLock::force(&TRANSITIONS);
}

/// Counts orders by the status they came to; a counter of transitions never scans the table.
pub(crate) fn count_transition(to: Status, orders: u64) {
    TRANSITIONS.with_label_values(&[to.as_str()]).inc_by(orders);
}

static TRANSITIONS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let opts = Opts::new("loms_orders_total", "Orders that came to a status.");
    let transitions = registered(IntCounterVec::new(opts, &["status"]));
    // a counter that is not there cannot be seen to begin
    for status in Status::ALL {
        transitions.with_label_values(&[status.as_str()]);
    }
    transitions
});
