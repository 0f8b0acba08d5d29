//! `purchase` and `purchase_item`: what a call does with them. What the worker does besides is in `recovery.rs`.

use std::time::Duration;

use platform::pg::Db;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{decode, line};
use crate::{
    cart::{Line, UserId},
    purchase::{Found, IdempotencyKey, OpenPurchase, OrderId, Outcome, Shortage},
};

/// A purchase as whoever drives it finds it.
pub enum Loaded {
    /// Still to be decided. `stale`: older than the bound after which it is resolved instead of resumed.
    Open { purchase: OpenPurchase, stale: bool },
    /// Decided.
    Closed { outcome: Outcome, told: bool },
}

/// That a purchase has not been sent since this was written, if it is still there.
#[derive(Clone, Copy)]
pub struct SentMark(OffsetDateTime);

impl SentMark {
    pub(super) fn at(self) -> OffsetDateTime {
        self.0
    }
}

/// The user's purchase with this key.
pub async fn find_by_key(
    conn: &mut Db,
    cart_id: i64,
    key: &IdempotencyKey,
) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar!(
        "SELECT id FROM checkout.purchase WHERE cart_id = $1 AND idempotency_key = $2",
        cart_id,
        key.as_str()
    )
    .fetch_optional(conn)
    .await
}

/// The user's last purchase, open or closed: an open one is always the last, because none is begun beside it. Two looks
/// into an index each; one order over both would read and sort all that a user bought within days, under the lock.
pub async fn find_last(conn: &mut Db, cart_id: i64) -> Result<Option<Found>, sqlx::Error> {
    sqlx::query_as!(
        Found,
        r#"SELECT id, idempotency_key IS NOT NULL AS "has_key!", closed_at IS NOT NULL AS "closed!", told
           FROM checkout.purchase
           WHERE id = COALESCE(
               (SELECT id FROM checkout.purchase WHERE cart_id = $1 AND closed_at IS NULL),
               (SELECT id FROM checkout.purchase WHERE cart_id = $1 ORDER BY created_at DESC LIMIT 1)
           )"#,
        cart_id
    )
    .fetch_optional(conn)
    .await
}

/// Writes a purchase down, as one that may have been sent to LOMS: its own call is about to do so,
/// and the mark says that it has not yet. The worker leaves it alone for `resume_after`.
pub async fn insert_purchase(
    conn: &mut Db,
    cart_id: i64,
    key: Option<&IdempotencyKey>,
    resume_after: Duration,
) -> Result<(Uuid, SentMark), sqlx::Error> {
    let row = sqlx::query!(
        r#"INSERT INTO checkout.purchase (cart_id, idempotency_key, next_attempt_at, sent_at)
         VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3), clock_timestamp())
         RETURNING id, sent_at AS "sent_at!""#,
        cart_id,
        key.map(IdempotencyKey::as_str),
        resume_after.as_secs_f64()
    )
    .fetch_one(conn)
    .await?;
    Ok((row.id, SentMark(row.sent_at)))
}

/// Marks a purchase as sent to a LOMS that keeps keys. `false`: it must not be, because it is
/// closed, or one that ignores keys has been sent it before.
pub async fn mark_sent(conn: &mut Db, id: Uuid) -> Result<bool, sqlx::Error> {
    let marked = sqlx::query!(
        "UPDATE checkout.purchase SET sent_at = clock_timestamp()
         WHERE id = $1 AND closed_at IS NULL AND NOT sent_keyless",
        id
    )
    .execute(conn)
    .await?;
    Ok(marked.rows_affected() == 1)
}

/// Marks a purchase as sent to a LOMS that ignores keys. `false`: it must not be, because it may
/// have been sent since `unsent`, or at all, or is closed.
pub async fn mark_sent_keyless(
    conn: &mut Db,
    id: Uuid,
    unsent: Option<SentMark>,
) -> Result<bool, sqlx::Error> {
    let marked = sqlx::query!(
        "UPDATE checkout.purchase SET sent_at = clock_timestamp(), sent_keyless = true
         WHERE id = $1 AND closed_at IS NULL AND (sent_at IS NULL OR sent_at = $2)",
        id,
        unsent.map(|mark| mark.0)
    )
    .execute(conn)
    .await?;
    Ok(marked.rows_affected() == 1)
}

/// Marks the order of a purchase as one that LOMS is asked to cancel; whether it had not been
/// asked.
pub async fn mark_cancel_sent(conn: &mut Db, id: Uuid) -> Result<bool, sqlx::Error> {
    let marked = sqlx::query!(
        "UPDATE checkout.purchase SET cancel_sent_at = clock_timestamp()
         WHERE id = $1 AND closed_at IS NULL AND cancel_sent_at IS NULL",
        id
    )
    .execute(conn)
    .await?;
    Ok(marked.rows_affected() == 1)
}

/// Writes down which order an open purchase has.
pub async fn note_order(conn: &mut Db, id: Uuid, order: OrderId) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE checkout.purchase SET order_id = $2 WHERE id = $1 AND closed_at IS NULL",
        id,
        order.0
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Gives a purchase without a key the key of the call that is answered from it, so that a retry of that call is exact.
pub async fn adopt_key(conn: &mut Db, id: Uuid, key: &IdempotencyKey) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE checkout.purchase SET idempotency_key = $2 WHERE id = $1 AND idempotency_key IS NULL",
        id,
        key.as_str()
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Reads a purchase; `None` when it was swept.
pub async fn load_purchase(
    conn: &mut Db,
    id: Uuid,
    resolve_after: Duration,
) -> Result<Option<Loaded>, sqlx::Error> {
    let row = sqlx::query!(
        r#"SELECT purchase.cart_id, cart.user_id, purchase.resolving, purchase.attempts, purchase.told,
                  purchase.outcome, purchase.outcome_unknown, purchase.order_id, purchase.refusal,
                  purchase.sent_keyless,
                  purchase.shortages::text AS "shortages!",
                  purchase.created_at + make_interval(secs => $2) <= clock_timestamp() AS "stale!",
                  COALESCE(purchase.sent_at + make_interval(secs => $2) <= clock_timestamp(), false) AS "sent_long_ago!",
                  COALESCE(purchase.cancel_sent_at + make_interval(secs => $2) <= clock_timestamp(), false) AS "cancel_sent_long_ago!"
           FROM checkout.purchase JOIN checkout.cart ON cart.id = purchase.cart_id
           WHERE purchase.id = $1"#,
        id,
        resolve_after.as_secs_f64()
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if let Some(name) = row.outcome {
        let order = row.order_id.map(OrderId);
        let outcome = if row.outcome_unknown {
            Outcome::Unknown { order }
        } else {
            outcome(&name, order, &row.shortages, row.refusal)?
        };
        return Ok(Some(Loaded::Closed {
            outcome,
            told: row.told,
        }));
    }
    let purchase = OpenPurchase {
        id,
        cart_id: row.cart_id,
        user: UserId::new(row.user_id).ok_or_else(|| decode("a user outside of its CHECK"))?,
        lines: list_items(conn, id).await?,
        resolving: row.resolving,
        attempts: u32::try_from(row.attempts).unwrap_or_default(),
        order: row.order_id.map(OrderId),
        sent_keyless: row.sent_keyless,
        sent_long_ago: row.sent_long_ago,
        cancel_sent_long_ago: row.cancel_sent_long_ago,
    };
    Ok(Some(Loaded::Open {
        purchase,
        stale: row.stale,
    }))
}

/// The lines of a purchase in the order of SKU, as every order is sent to LOMS.
async fn list_items(conn: &mut Db, id: Uuid) -> Result<Vec<Line>, sqlx::Error> {
    sqlx::query!(
        "SELECT sku, count FROM checkout.purchase_item WHERE purchase_id = $1 ORDER BY sku",
        id
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(|row| line(row.sku, row.count))
    .collect()
}

fn outcome(
    name: &str,
    order: Option<OrderId>,
    shortages: &str,
    refusal: Option<String>,
) -> Result<Outcome, sqlx::Error> {
    let shortages =
        serde_json::from_str(shortages).map_err(|error| sqlx::Error::Decode(error.into()))?;
    match (name, order) {
        ("made", Some(order)) => Ok(Outcome::Made { order }),
        ("failed", Some(order)) => Ok(Outcome::Failed { order, shortages }),
        ("cancelled", Some(order)) => Ok(Outcome::Cancelled { order }),
        // the next release writes it so
        ("unknown", order) => Ok(Outcome::Unknown { order }),
        ("refused", None) => Ok(Outcome::Refused {
            reason: refusal.unwrap_or_default(),
        }),
        _ => Err(decode("an outcome outside of its CHECKs")),
    }
}

/// From here on the order may be cancelled, and an answer that was asked for before does not close the purchase.
pub async fn mark_resolving(conn: &mut Db, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE checkout.purchase SET resolving = true WHERE id = $1 AND closed_at IS NULL",
        id
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Closes a purchase. `false`: another driver has closed it, it began to be resolved since it was
/// read, or it is to be closed as unknown and was sent since it was read. Only the driver that gets
/// `true` may move lines.
pub async fn close_purchase(
    conn: &mut Db,
    purchase: &OpenPurchase,
    outcome: &Outcome,
    resolve_after: Duration,
) -> Result<bool, sqlx::Error> {
    let (shortages, refusal): (&[Shortage], Option<&str>) = match outcome {
        Outcome::Failed { shortages, .. } => (shortages, None),
        Outcome::Refused { reason } => (&[], Some(reason)),
        Outcome::Unknown { order: None } => (&[], Some("the outcome is unknown")),
        Outcome::Made { .. } | Outcome::Cancelled { .. } | Outcome::Unknown { .. } => (&[], None),
    };
    // as the release before can read it
    let (name, unknown) = match outcome {
        Outcome::Unknown { order: None } => ("refused", true),
        Outcome::Unknown { order: Some(_) } => ("cancelled", true),
        known => (known.name(), false),
    };
    let shortages =
        serde_json::to_string(shortages).map_err(|error| sqlx::Error::Encode(error.into()))?;
    let closed = sqlx::query!(
        "UPDATE checkout.purchase
         SET closed_at = clock_timestamp(), outcome = $3, order_id = $4, shortages = $5::text::jsonb, refusal = $6,
             outcome_unknown = $7
         WHERE id = $1 AND closed_at IS NULL AND resolving = $2
           AND (NOT $7 OR $4::bigint IS NOT NULL OR sent_at + make_interval(secs => $8) <= clock_timestamp())",
        purchase.id,
        purchase.resolving,
        name,
        outcome.order().map(|order| order.0),
        shortages,
        refusal,
        unknown,
        resolve_after.as_secs_f64()
    )
    .execute(conn)
    .await?;
    Ok(closed.rows_affected() == 1)
}

/// Whether a caller has heard the outcome.
pub async fn mark_told(conn: &mut Db, id: Uuid, told: bool) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE checkout.purchase SET told = $2 WHERE id = $1 AND closed_at IS NOT NULL",
        id,
        told
    )
    .execute(conn)
    .await?;
    Ok(())
}
