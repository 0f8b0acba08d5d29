//! `purchase` and `purchase_item`: what a call does with them. What the worker does besides is in `recovery.rs`.

use std::time::Duration;

use platform::pg::Db;
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

/// Writes a purchase down. The worker leaves it alone for `resume_after`: its own call is at it.
pub async fn insert_purchase(
    conn: &mut Db,
    cart_id: i64,
    key: Option<&IdempotencyKey>,
    resume_after: Duration,
) -> Result<Uuid, sqlx::Error> {
    sqlx::query_scalar!(
        "INSERT INTO checkout.purchase (cart_id, idempotency_key, next_attempt_at)
         VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3))
         RETURNING id",
        cart_id,
        key.map(IdempotencyKey::as_str),
        resume_after.as_secs_f64()
    )
    .fetch_one(conn)
    .await
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
                  purchase.outcome, purchase.order_id, purchase.refusal,
                  purchase.shortages::text AS "shortages!",
                  purchase.created_at + make_interval(secs => $2) <= clock_timestamp() AS "stale!"
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
        let outcome = outcome(&name, order, &row.shortages, row.refusal)?;
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

/// Closes a purchase; `false` when somebody else has, or when it began to be resolved since it was read. Only who gets
/// `true` may move lines.
pub async fn close_purchase(
    conn: &mut Db,
    purchase: &OpenPurchase,
    outcome: &Outcome,
) -> Result<bool, sqlx::Error> {
    let (shortages, refusal): (&[Shortage], Option<&str>) = match outcome {
        Outcome::Failed { shortages, .. } => (shortages, None),
        Outcome::Refused { reason } => (&[], Some(reason)),
        Outcome::Made { .. } | Outcome::Cancelled { .. } => (&[], None),
    };
    let shortages =
        serde_json::to_string(shortages).map_err(|error| sqlx::Error::Encode(error.into()))?;
    let closed = sqlx::query!(
        "UPDATE checkout.purchase
         SET closed_at = clock_timestamp(), outcome = $3, order_id = $4, shortages = $5::text::jsonb, refusal = $6
         WHERE id = $1 AND closed_at IS NULL AND resolving = $2",
        purchase.id,
        purchase.resolving,
        outcome.name(),
        outcome.order().map(|order| order.0),
        shortages,
        refusal
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
