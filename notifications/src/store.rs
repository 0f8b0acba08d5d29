//! Every SQL statement of the service, a function each. Callers own transactions.

pub mod dead_letters;
pub(crate) mod import;
pub(crate) mod online;
pub mod saving;
pub mod starts;

use platform::pg::Db;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    event::UserId,
    message::{Due, Position, Told},
};

/// A user's messages of `from <= created_at < until` after a position, in the history's order.
pub async fn read_history(
    connection: &mut Db,
    user: UserId,
    from: OffsetDateTime,
    until: OffsetDateTime,
    after: Option<Position>,
    limit: i64,
) -> Result<Vec<Told>, sqlx::Error> {
    // before every row: the first page needs no statement of its own
    let after = after.unwrap_or(Position {
        micros: 0,
        order: 0,
        sequence: 0,
        id: 0,
    });
    let start = time_of(after.micros)
        .filter(|_| after.id > 0)
        .unwrap_or(from);
    let rows = sqlx::query!(
        r#"
        SELECT id, order_id, sequence, status, message, created_at
        FROM notifications.message
        WHERE user_id = $1 AND created_at >= $2 AND created_at < $3
          AND (created_at, order_id, sequence, id) > ($4, $5, $6, $7)
        ORDER BY created_at, order_id, sequence, id
        LIMIT $8
        "#,
        user.get(),
        from,
        until,
        start,
        after.order,
        after.sequence,
        after.id,
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Told {
            position: Position {
                micros: micros_of(row.created_at),
                order: row.order_id,
                sequence: row.sequence,
                id: row.id,
            },
            status: row.status,
            message: row.message,
        })
        .collect())
}

/// Takes or keeps the right to send; `None` while another replica has it. Answers how many seconds the sender has to
/// pause yet.
pub async fn take_lease(
    connection: &mut Db,
    holder: Uuid,
    lease_seconds: f64,
) -> Result<Option<f64>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"
        UPDATE notifications.sender
        SET holder = $1, leased_until = now() + make_interval(secs => $2)
        WHERE holder = $1 OR leased_until <= now()
        RETURNING GREATEST(EXTRACT(EPOCH FROM paused_until - now()), 0)::double precision AS "pause!"
        "#,
        holder,
        lease_seconds,
    )
    .fetch_optional(connection)
    .await
}

/// Gives the right to send back, so that another replica need not wait for it to lapse.
pub async fn release_lease(connection: &mut Db, holder: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE notifications.sender SET leased_until = now() WHERE holder = $1",
        holder
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Makes every sender wait, this one and whichever takes over.
pub async fn pause_sender(connection: &mut Db, seconds: f64) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE notifications.sender SET paused_until = GREATEST(paused_until, now() + make_interval(secs => $1))",
        seconds,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// What is to be told now: of each order only its lowest untold event, the longest waiting first. No lock is taken,
/// the lease is what keeps others away. A subquery, not NOT EXISTS: that becomes a join, and before the table's first
/// ANALYZE one that reads the whole queue for each row (seen: 240 ms instead of 0.07 ms). Here and below, what "untold" is
/// said with chooses the index: see the migration that separated them.
pub async fn list_due(
    connection: &mut Db,
    give_up_after_seconds: f64,
    limit: i64,
) -> Result<Vec<Due>, sqlx::Error> {
    sqlx::query_as!(
        Due,
        r#"
        SELECT m.id, m.order_id AS "order", m.user_id AS "user", m.status, m.attempts, m.last_error, m.traceparent,
               m.saved_at <= now() - make_interval(secs => $1) AS "overdue!"
        FROM notifications.message AS m
        WHERE m.told_at IS NULL AND m.given_up_at IS NULL AND m.next_attempt_at <= now()
          AND m.id = (
              SELECT lowest.id FROM notifications.message AS lowest
              WHERE lowest.order_id = m.order_id AND COALESCE(lowest.told_at, lowest.given_up_at) IS NULL
              ORDER BY notifications.place(lowest.sequence, lowest.status), lowest.id
              LIMIT 1)
        ORDER BY m.next_attempt_at, m.id
        LIMIT $2
        "#,
        give_up_after_seconds,
        limit,
    )
    .fetch_all(connection)
    .await
}

/// Marks messages as told.
pub async fn mark_told(connection: &mut Db, ids: &[i64]) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"
        UPDATE notifications.message SET told_at = now(), attempts = attempts + 1
        WHERE id = ANY($1) AND num_nulls(told_at, given_up_at) = 2
        "#,
        ids,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Notes a failed attempt and when the next one is due. What the order has untold besides waits with it: due and not
/// eligible, it would be in the way of every look for what is (seen: 590 ms with 100,000 orders in an outage). Only if
/// nobody noted one since: a commit whose answer was lost is repeated, and must not count twice.
pub async fn postpone(
    connection: &mut Db,
    due: &Due,
    error: &str,
    wait_seconds: f64,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"
        UPDATE notifications.message
        SET attempts = attempts + (id = $1)::integer,
            last_error = CASE WHEN id = $1 THEN $3 ELSE last_error END,
            next_attempt_at = now() + make_interval(secs => $4)
        WHERE num_nulls(told_at, given_up_at) = 2 AND id = ANY (ARRAY (
            SELECT of_order.id FROM notifications.message AS of_order
            WHERE of_order.order_id = $2 AND COALESCE(of_order.told_at, of_order.given_up_at) IS NULL))
          AND (SELECT tried.attempts FROM notifications.message AS tried WHERE tried.id = $1) = $5
        "#,
        due.id,
        due.order,
        error,
        wait_seconds,
        due.attempts,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Gives a message up and keeps the reason; the order's next one is then eligible.
pub async fn give_up(
    connection: &mut Db,
    id: i64,
    attempts: i32,
    reason: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"
        UPDATE notifications.message SET given_up_at = now(), attempts = $2, give_up_reason = $3
        WHERE id = $1 AND num_nulls(told_at, given_up_at) = 2
        "#,
        id,
        attempts,
        reason,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// A time as microseconds since 1970, what a `timestamptz` keeps.
fn micros_of(at: OffsetDateTime) -> i64 {
    i64::try_from(at.unix_timestamp_nanos() / 1_000).unwrap_or_default()
}

/// Its inverse, where there is such a time.
pub fn time_of(micros: i64) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1_000).ok()
}
