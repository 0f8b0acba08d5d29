//! AbandonOrder: a purchase that is given up leaves no order. A key without an order gets a
//! tombstone, so that a CreateOrder that is still under way finds it; an order that awaits payment
//! is cancelled.

use std::time::Duration;

use platform::pg::{Db, Pool};
use time::OffsetDateTime;

use crate::{
    allocation::Shortage,
    crash::CrashPoint,
    error::Error,
    order::{Event, OrderId, Status, UserId},
    orders::{Change, count_transition, settle},
    outbox::Relay,
    store::{keys, orders, placement},
};

/// How often it is begun again because the key was swept in between; once is already unlikely.
const SWEPT_ROUNDS: usize = 3;
/// A key that is about to be swept may be gone when it is looked for.
const SWEEP_MARGIN: Duration = Duration::from_secs(60 * 60);

/// A key that is given up.
#[derive(Clone, Debug)]
pub(crate) struct Abandonment {
    pub(crate) user: UserId,
    pub(crate) key: String,
    /// When CreateOrder was first sent with it.
    pub(crate) first_tried_at: OffsetDateTime,
    /// Trace context of the call, kept with the event of a cancelled order.
    pub(crate) traceparent: Option<String>,
}

/// What a key that is given up leaves.
#[derive(Debug)]
pub(crate) enum Abandoned {
    /// No order, and there will be none.
    Nothing,
    /// The order that was made for it: cancelled, or failed or payed before.
    Order {
        id: OrderId,
        status: Status,
        shortages: Vec<Shortage>,
    },
}

/// What a transaction has found.
enum Written {
    Found(Abandoned),
    /// An order that it has cancelled.
    Cancelled(OrderId),
    /// The key was there when a tombstone was to be set, and swept when it was looked for.
    Swept,
}

/// Gives a key up; keys are kept for `keep`.
///
/// # Errors
/// The key may have been swept, so that nobody knows whether it has an order.
pub(crate) async fn abandon(
    pool: &Pool,
    relay: &Relay,
    keep: Duration,
    what: &Abandonment,
) -> Result<Abandoned, Error> {
    for _ in 0..SWEPT_ROUNDS {
        let write = async |db: &mut Db| write_abandonment(db, keep, what).await;
        match pool.with_row(what.user.get(), write).await? {
            Written::Found(found) => return Ok(found),
            Written::Cancelled(id) => {
                count_transition(Status::Cancelled, 1);
                relay.wake();
                return Ok(Abandoned::Order {
                    id,
                    status: Status::Cancelled,
                    shortages: Vec::new(),
                });
            }
            Written::Swept => {}
        }
    }
    Err(platform::pg::Error::conflict("the key was swept each time").into())
}

/// The transaction of [`abandon`]: the key, then the order, then its stock, as everywhere.
async fn write_abandonment(
    db: &mut Db,
    keep: Duration,
    what: &Abandonment,
) -> Result<Written, Error> {
    let mut tx = db.begin().await?;
    let kept = keep.saturating_sub(SWEEP_MARGIN);
    if keys::is_older(&mut tx, what.first_tried_at, kept).await? {
        return Err(Error::KeyExpired);
    }
    if keys::insert_tombstone(&mut tx, what.user, &what.key).await? {
        tx.commit().await?;
        return Ok(Written::Found(Abandoned::Nothing));
    }
    // a statement of its own: it sees what the insertion has waited for
    let asked = [(what.user, what.key.as_str())];
    let owners = keys::read_key_owners(&mut tx, &asked).await?;
    let Some(owner) = owners.into_values().next() else {
        return Ok(Written::Swept);
    };
    if owner.is_tombstone() {
        return Ok(Written::Found(Abandoned::Nothing));
    }
    let id = owner.order;
    let status = orders::lock_order(&mut tx, id).await?;
    let status = status.ok_or(Error::Broken)?;
    if status == Status::AwaitingPayment {
        let change = Change {
            order: id,
            traceparent: what.traceparent.clone(),
        };
        settle(&mut tx, &[change], Event::Abandon).await?;
        CrashPoint::OrderSettling.pass();
        tx.commit().await?;
        CrashPoint::OrderSettled.pass();
        return Ok(Written::Cancelled(id));
    }
    let mut shortages = placement::read_shortages(&mut tx, &[id]).await?;
    Ok(Written::Found(Abandoned::Order {
        id,
        status,
        shortages: shortages.remove(&id).unwrap_or_default(),
    }))
}
