//! Idempotency keys: claimed by the batch that makes their orders, swept when their time is over.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use platform::pg::Db;
use time::OffsetDateTime;

use crate::order::{OrderId, UserId};

/// A caller's key with what it stands for.
pub(crate) struct KeyClaim<'a> {
    pub(crate) user: UserId,
    pub(crate) key: &'a str,
    pub(crate) body_hash: &'a [u8],
    pub(crate) order: OrderId,
}

/// A key that was claimed before.
pub(crate) struct KeyOwner {
    pub(crate) body_hash: Vec<u8>,
    pub(crate) order: OrderId,
}

/// What stands in a key's row instead of an order when the key was given up. Its hash is that of no
/// request: a replica of the release before answers with `IDEMPOTENCY_KEY_REUSED`.
const NO_ORDER: OrderId = OrderId(0);

impl KeyOwner {
    /// Whether the key was given up before an order was made for it.
    pub(crate) fn is_tombstone(&self) -> bool {
        self.order == NO_ORDER
    }
}

/// Gives a key up, if nobody has claimed it; whether it is given up now. Waits for whoever is
/// claiming it right now.
pub(crate) async fn insert_tombstone(db: &mut Db, user: UserId, key: &str) -> sqlx::Result<bool> {
    let inserted = sqlx::query!(
        "INSERT INTO loms.idempotency_key (user_id, key, body_hash, order_id)
         VALUES ($1, $2, '', $3) ON CONFLICT DO NOTHING",
        user.get(),
        key,
        NO_ORDER.0
    )
    .execute(db)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

/// Whether `at` is longer than `age` ago by the database's clock.
pub(crate) async fn is_older(db: &mut Db, at: OffsetDateTime, age: Duration) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"SELECT $1 < clock_timestamp() - make_interval(secs => $2) AS "older!""#,
        at,
        age.as_secs_f64()
    )
    .fetch_one(db)
    .await
}

/// Claims keys, and returns the orders whose keys were free. Waits for whoever is claiming the same key right now.
pub(crate) async fn claim_keys(
    db: &mut Db,
    claims: &[KeyClaim<'_>],
) -> sqlx::Result<HashSet<OrderId>> {
    let users: Vec<i64> = claims.iter().map(|claim| claim.user.get()).collect();
    let keys: Vec<&str> = claims.iter().map(|claim| claim.key).collect();
    let hashes: Vec<&[u8]> = claims.iter().map(|claim| claim.body_hash).collect();
    let orders: Vec<i64> = claims.iter().map(|claim| claim.order.0).collect();
    // sorted: two batches that claim the same keys in opposite orders would wait for each other
    let won = sqlx::query_scalar!(
        r#"INSERT INTO loms.idempotency_key (user_id, key, body_hash, order_id)
           SELECT c.user_id, c.key, c.body_hash, c.order_id
           FROM UNNEST($1::bigint[], $2::text[], $3::bytea[], $4::bigint[]) AS c (user_id, key, body_hash, order_id)
           ORDER BY c.user_id, c.key
           ON CONFLICT DO NOTHING
           RETURNING order_id"#,
        &users,
        &keys as &[&str],
        &hashes as &[&[u8]],
        &orders
    )
    .fetch_all(db)
    .await?;
    Ok(won.into_iter().map(OrderId).collect())
}

/// Who owns the keys that were not free. A statement of its own: it sees what the claim has waited for.
pub(crate) async fn read_key_owners(
    db: &mut Db,
    keys: &[(UserId, &str)],
) -> sqlx::Result<HashMap<(UserId, String), KeyOwner>> {
    let users: Vec<i64> = keys.iter().map(|(user, _)| user.get()).collect();
    let names: Vec<&str> = keys.iter().map(|(_, key)| *key).collect();
    let rows = sqlx::query!(
        r#"SELECT k.user_id, k.key, k.body_hash, k.order_id
           FROM UNNEST($1::bigint[], $2::text[]) AS c (user_id, key)
           JOIN loms.idempotency_key k ON k.user_id = c.user_id AND k.key = c.key"#,
        &users,
        &names as &[&str]
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .filter_map(|row| {
            let owner = KeyOwner {
                body_hash: row.body_hash,
                order: OrderId(row.order_id),
            };
            Some(((UserId::new(row.user_id)?, row.key), owner))
        })
        .collect())
}

/// Deletes at most `limit` keys that are older than `keep` by the database's clock, the oldest first; returns how many.
/// Keys are taken out of their order here: `SKIP LOCKED` never waits, and a claim of a key that is being deleted waits
/// for this one statement at most.
pub(crate) async fn sweep_keys(db: &mut Db, keep: Duration, limit: i64) -> sqlx::Result<u64> {
    // now() and not the clock, which no index is searched with; by place, so that the delete needs no plan of its own
    let swept = sqlx::query!(
        r#"DELETE FROM loms.idempotency_key
           WHERE ctid = ANY (ARRAY(
               SELECT ctid FROM loms.idempotency_key
               WHERE created_at < now() - make_interval(secs => $1)
               ORDER BY created_at LIMIT $2
               FOR UPDATE SKIP LOCKED
           ))"#,
        keep.as_secs_f64(),
        limit
    )
    .execute(db)
    .await?;
    Ok(swept.rows_affected())
}
