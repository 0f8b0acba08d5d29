//! Events that wait for the broker.

use std::time::Duration;

use platform::pg::Db as PgConnection;
use time::OffsetDateTime;

use super::status;
use crate::order::{OrderId, Status};

/// An event as the relay sends it.
pub(crate) struct OutboxRow {
    pub(crate) id: i64,
    pub(crate) order: OrderId,
    pub(crate) sequence: i32,
    pub(crate) traceparent: Option<String>,
    pub(crate) user: i64,
    pub(crate) status: Status,
    pub(crate) at: OffsetDateTime,
}

/// "LOMS relay" in ASCII, cut to 63 bits: the advisory lock that one relay holds at a time.
const RELAY_LOCK: i64 = 0x4c4f_4d53_2072_656c;

/// Becomes the relay for this transaction, unless another process is, and lets it wait so long for the broker: for
/// PostgreSQL it is idle meanwhile.
pub(crate) async fn try_lock_relay(db: &mut PgConnection, idle: Duration) -> sqlx::Result<bool> {
    let row = sqlx::query!(
        r#"SELECT pg_try_advisory_xact_lock($1) AS "won!",
                  set_config('idle_in_transaction_session_timeout', $2, TRUE)"#,
        RELAY_LOCK,
        idle.as_millis().to_string()
    )
    .fetch_one(db)
    .await?;
    Ok(row.won)
}

/// The oldest events, by id: within an order that is the order of their sequence.
pub(crate) async fn read_oldest(db: &mut PgConnection, limit: i64) -> sqlx::Result<Vec<OutboxRow>> {
    let rows = sqlx::query!(
        r#"SELECT o.id, o.order_id, o.sequence, o.traceparent, u.user_id, h.to_status::text AS "status!", h.at
           FROM (SELECT id, order_id, sequence, traceparent FROM loms.outbox ORDER BY id LIMIT $1) AS o
           JOIN loms.status_change h ON h.order_id = o.order_id AND h.sequence = o.sequence
           JOIN loms.user_order u ON u.id = o.order_id
           ORDER BY o.id"#,
        limit
    )
    .fetch_all(db)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(OutboxRow {
                id: row.id,
                order: OrderId(row.order_id),
                sequence: row.sequence,
                status: status(&row.status)?,
                traceparent: row.traceparent,
                user: row.user_id,
                at: row.at,
            })
        })
        .collect()
}

/// Deletes what the broker has, and counts it in the same commit: the audit holds the count against the history.
pub(crate) async fn delete_sent(db: &mut PgConnection, ids: &[i64]) -> sqlx::Result<u64> {
    let counted = sqlx::query_scalar!(
        r#"WITH gone AS (DELETE FROM loms.outbox WHERE id = ANY($1) RETURNING id)
           UPDATE loms.relay SET sent = sent + (SELECT count(*) FROM gone)
           RETURNING (SELECT count(*) FROM gone) AS "gone!""#,
        ids
    )
    .fetch_one(db)
    .await?;
    Ok(counted.cast_unsigned())
}

/// How many events wait (counted up to `most`), and the age of the oldest in seconds.
pub(crate) async fn read_backlog(db: &mut PgConnection, most: i64) -> sqlx::Result<(i64, f64)> {
    let row = sqlx::query!(
        r#"SELECT (SELECT count(*) FROM (SELECT 1 FROM loms.outbox LIMIT $1) AS waiting) AS "rows!",
                  coalesce((SELECT extract(epoch FROM clock_timestamp() - created_at)
                            FROM loms.outbox ORDER BY id LIMIT 1), 0)::float8 AS "age!""#,
        most
    )
    .fetch_one(db)
    .await?;
    Ok((row.rows, row.age))
}
