//! `purchase` as the worker sees it: what is due, what has to wait, what is old. Rows are looked for by
//! `statement_timestamp()`, because no index is searched with `clock_timestamp()`, which may change from row to row.

use std::time::Duration;

use platform::pg::Db;
use uuid::Uuid;

use super::purchases::SentMark;

/// Open purchases, for the metrics.
pub struct Backlog {
    /// How many.
    pub open: i64,
    /// Age of the oldest in seconds, 0 when there is none.
    pub oldest_seconds: f64,
}

/// Takes over at most `limit` open purchases that are due, the longest waiting first, and keeps other workers off them
/// for `lease`. `SKIP LOCKED`: what somebody is deciding right now needs no help.
/// The array makes the plan look for them once; an `IN` may be planned as a loop that locks more than the limit.
pub async fn claim_due(
    conn: &mut Db,
    limit: i64,
    lease: Duration,
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar!(
        "UPDATE checkout.purchase
         SET next_attempt_at = clock_timestamp() + make_interval(secs => $2)
         WHERE id = ANY (ARRAY(
             SELECT id FROM checkout.purchase
             WHERE closed_at IS NULL AND next_attempt_at <= statement_timestamp()
             ORDER BY next_attempt_at
             LIMIT $1
             FOR NO KEY UPDATE SKIP LOCKED
         ))
         RETURNING id",
        limit,
        lease.as_secs_f64()
    )
    .fetch_all(conn)
    .await
}

/// Puts the next attempt off, by the database's clock. With `unsent`, the caller has not sent the
/// purchase: its mark is removed, unless another driver has replaced it.
pub async fn postpone(
    conn: &mut Db,
    id: Uuid,
    wait: Duration,
    unsent: Option<SentMark>,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE checkout.purchase
         SET attempts = attempts + 1, next_attempt_at = clock_timestamp() + make_interval(secs => $2),
             sent_at = CASE WHEN sent_at = $3 THEN NULL ELSE sent_at END
         WHERE id = $1 AND closed_at IS NULL",
        id,
        wait.as_secs_f64(),
        unsent.map(SentMark::at)
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Deletes purchases that were closed longer than `keep` ago, `limit` at a time so that no sweep holds many locks.
pub async fn sweep_closed(conn: &mut Db, keep: Duration, limit: i64) -> Result<u64, sqlx::Error> {
    let swept = sqlx::query!(
        "DELETE FROM checkout.purchase
         WHERE id = ANY (ARRAY(
             SELECT id FROM checkout.purchase
             WHERE closed_at < statement_timestamp() - make_interval(secs => $1)
             ORDER BY closed_at
             LIMIT $2
             FOR UPDATE SKIP LOCKED
         ))",
        keep.as_secs_f64(),
        limit
    )
    .execute(conn)
    .await?;
    Ok(swept.rows_affected())
}

/// Counts what is open; the partial index makes it as cheap as there is little of it.
pub async fn measure_backlog(conn: &mut Db) -> Result<Backlog, sqlx::Error> {
    sqlx::query_as!(
        Backlog,
        r#"SELECT count(*) AS "open!",
                  COALESCE(EXTRACT(EPOCH FROM clock_timestamp() - min(created_at)), 0)::float8 AS "oldest_seconds!"
           FROM checkout.purchase
           WHERE closed_at IS NULL"#
    )
    .fetch_one(conn)
    .await
}
