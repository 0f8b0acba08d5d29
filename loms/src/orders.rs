//! Orders that exist: shown, payed, cancelled.

use std::{collections::HashMap, sync::LazyLock};

use platform::{
    grpc::registered,
    pg::{self, Db, Pool},
};
use prometheus::{IntCounterVec, Opts};

use crate::{
    crash::CrashPoint,
    error::Error,
    order::{Actor, Event, OrderId, Status},
    outbox::Relay,
    store::orders::{self as store, OrderRow},
};

/// The order as it is now.
pub(crate) async fn list(pool: &Pool, order: OrderId) -> Result<OrderRow, Error> {
    let read = async |db: &mut Db| store::read_order(db, order).await;
    pool.repeatable(read)
        .await?
        .ok_or(Error::OrderUnknown(order))
}

/// An order that somebody wants to have payed or cancelled.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) order: OrderId,
    /// Trace context of the call, kept with its event.
    pub(crate) traceparent: Option<String>,
}

/// Pays or cancels in a transaction of its own. Payed, the reservation is written off; cancelled, the units are back on
/// sale. Again is no change.
pub(crate) async fn change(
    pool: &Pool,
    relay: &Relay,
    change: &Change,
    event: Event,
) -> Result<(), Error> {
    let write = async |db: &mut Db| write_change(db, change, event).await;
    if let Some(to) = pool.with_row(change.order.0, write).await? {
        count_transition(to, 1);
        relay.wake();
    }
    Ok(())
}

/// The transaction of [`change`]. `None`: the order was there already, nothing is written.
async fn write_change(db: &mut Db, change: &Change, event: Event) -> Result<Option<Status>, Error> {
    let order = change.order;
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
    let settled = settle(&mut tx, std::slice::from_ref(change), event).await?;
    if settled.is_empty() {
        return Err(Error::PaymentLate(order));
    }
    CrashPoint::OrderSettling.pass();
    tx.commit().await?;
    CrashPoint::OrderSettled.pass();
    Ok(Some(to))
}

/// Ends the wait for payment of orders that the transaction has locked and seen awaiting: stock, status, history and
/// event. Returns which: all, but for payments only those whose deadline has not passed.
pub(crate) async fn settle(
    db: &mut Db,
    changes: &[Change],
    event: Event,
) -> pg::Result<Vec<OrderId>> {
    let to = Status::AwaitingPayment
        .apply(event)
        .map_err(|_| pg::Error::invariant(format!("{event:?} does not end a wait for payment")))?;
    let in_time_only = event == Event::Pay;
    let all: Vec<OrderId> = changes.iter().map(|change| change.order).collect();
    let ended = store::end_payment_wait(db, &all, in_time_only).await?;
    if ended.len() != all.len() && !in_time_only {
        return Err(lost_rows("deadlines", all.len(), ended.len()));
    }
    if ended.is_empty() {
        return Ok(ended);
    }
    let released = if to == Status::Payed {
        store::write_off(db, &ended).await?;
        Vec::new()
    } else {
        store::end_reservations(db, &ended).await?
    };
    let actor = match event {
        Event::Expire => Actor::Timeout,
        Event::Abandon => Actor::Abandoned,
        Event::Reserve | Event::Reject | Event::Pay | Event::Cancel => Actor::User,
    };
    let traces: HashMap<OrderId, Option<&str>> = changes
        .iter()
        .map(|change| (change.order, change.traceparent.as_deref()))
        .collect();
    let traces: Vec<Option<&str>> = ended
        .iter()
        .map(|order| traces.get(order).copied().flatten())
        .collect();
    let settled = store::settle(db, &ended, &traces, to, actor).await?;
    if settled != ended.len() as u64 {
        return Err(lost_rows("orders", ended.len(), settled as usize));
    }
    if !released.is_empty() {
        // last: new orders wait for these rows until the commit
        let put = store::put_on_sale(db, &released).await?;
        if put != released.len() as u64 {
            return Err(lost_rows("rows of stock", released.len(), put as usize));
        }
    }
    Ok(ended)
}

fn lost_rows(what: &str, wanted: usize, found: usize) -> pg::Error {
    pg::Error::invariant(format!("{wanted} {what} should be there and {found} are"))
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
