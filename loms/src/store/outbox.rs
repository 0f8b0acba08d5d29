//! Events that wait for the broker.

use std::time::Duration;

use platform::pg::Db;
use time::OffsetDateTime;
use uuid::Uuid;

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
    /// `None` of a step that was taken over without its time.
    pub(crate) at: Option<OffsetDateTime>,
}

/// "LOMS rel" in ASCII: the advisory lock that a relay of the release before holds while it sends.
const RELAY_LOCK: i64 = 0x4c4f_4d53_2072_656c;

/// Whether no relay of the release before is sending; until this transaction ends none begins. Shared, so that relays of
/// this release are not in each other's way. Their lease is kept without waiting for the log to be flushed, or for a
/// standby: a server that forgets it in a crash lets two relays send at once, and that is harmless (see migration 10).
pub(crate) async fn try_lock_relay(db: &mut Db) -> sqlx::Result<bool> {
    let row = sqlx::query!(
        r#"SELECT pg_try_advisory_xact_lock_shared($1) AS "won!",
                  set_config('synchronous_commit', 'off', TRUE)"#,
        RELAY_LOCK
    )
    .fetch_one(db)
    .await?;
    Ok(row.won)
}

/// Takes or renews the lease and reads the oldest events, by id: within an order that is the order
/// of their sequence. Empty if nothing waits, or if another relay has the lease, or if events are
/// sent with another partitioner.
pub(crate) async fn read_leased(
    db: &mut Db,
    holder: Uuid,
    lease: Duration,
    limit: i64,
    partitioner: &str,
) -> sqlx::Result<Vec<OutboxRow>> {
    let rows = sqlx::query!(
        r#"WITH lease AS (
               UPDATE loms.relay SET holder = $1, leased_until = clock_timestamp() + make_interval(secs => $2)
               WHERE (holder = $1 OR leased_until <= clock_timestamp())
                 AND coalesce(partitioner, 'consistent_random') = $4
               RETURNING holder
           )
           SELECT o.id, o.order_id, o.sequence, o.traceparent, u.user_id, h.to_status::text AS "status!", h.at
           FROM lease
           CROSS JOIN (SELECT id, order_id, sequence, traceparent FROM loms.outbox ORDER BY id LIMIT $3) AS o
           JOIN loms.status_change h ON h.order_id = o.order_id AND h.sequence = o.sequence
           JOIN loms.user_order u ON u.id = o.order_id
           ORDER BY o.id"#,
        holder,
        lease.as_secs_f64(),
        limit,
        partitioner
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

/// What events are sent with, and whether some wait whose predecessors were sent; until this
/// transaction ends nobody takes the lease or changes it. After an import events wait, and no relay
/// has sent any.
pub(crate) async fn lock_partitioner(db: &mut Db) -> sqlx::Result<(Option<String>, bool)> {
    let row = sqlx::query!(
        r#"SELECT partitioner,
                  EXISTS (SELECT 1 FROM loms.outbox)
                  AND NOT (partitioner IS NULL AND EXISTS (SELECT 1 FROM loms.import WHERE state = 'done')) AS "waiting!"
           FROM loms.relay FOR NO KEY UPDATE OF relay"#
    )
    .fetch_one(db)
    .await?;
    Ok((row.partitioner, row.waiting))
}

/// Writes down what events are sent with from now on.
pub(crate) async fn write_partitioner(db: &mut Db, partitioner: &str) -> sqlx::Result<()> {
    sqlx::query!("UPDATE loms.relay SET partitioner = $1", partitioner)
        .execute(db)
        .await?;
    Ok(())
}

/// Keeps the lease for so long from now, if nobody has taken it over; no time at all gives it back.
pub(crate) async fn extend_lease(db: &mut Db, holder: Uuid, lease: Duration) -> sqlx::Result<bool> {
    let kept = sqlx::query!(
        r#"UPDATE loms.relay SET leased_until = clock_timestamp() + make_interval(secs => $2)
           WHERE holder = $1
           RETURNING set_config('synchronous_commit', 'off', TRUE)"#,
        holder,
        lease.as_secs_f64()
    )
    .fetch_optional(db)
    .await?;
    Ok(kept.is_some())
}

/// Deletes what the broker has, whoever has the lease by now, and counts what was really there in the same commit: the
/// audit holds the count against the history.
pub(crate) async fn delete_sent(db: &mut Db, ids: &[i64]) -> sqlx::Result<u64> {
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
pub(crate) async fn read_backlog(db: &mut Db, most: i64) -> sqlx::Result<(i64, f64)> {
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
