//! Every SQL statement of the service, a function each. Callers own transactions.

pub(crate) mod online;

use platform::pg::Db;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    event::{Received, Source, Stored, UserId},
    message::{Due, Position, Told, words},
};

/// A transaction that looks up every row by an index. A plan made while the table fits into a few pages would read all of it,
/// for each record, and is kept while the table grows (until it is analyzed).
pub const BEGIN_SAVING: &str = "BEGIN; SET LOCAL enable_seqscan = off";

/// Saves what is not saved yet and answers which were; within [`BEGIN_SAVING`]. `records` must be in the order (order, sequence): two replicas
/// that save the same events then wait for each other instead of deadlocking. What an order has untold may wait after a
/// failure: its next event waits with it, see [`postpone`].
pub async fn insert_messages(
    connection: &mut Db,
    topic: &str,
    records: &[&Received],
) -> Result<Vec<Source>, sqlx::Error> {
    let users: Vec<i64> = records
        .iter()
        .map(|record| record.event.user.get())
        .collect();
    let orders: Vec<i64> = records
        .iter()
        .map(|record| record.event.order.get())
        .collect();
    let sequences: Vec<i32> = records.iter().map(|record| record.event.sequence).collect();
    let statuses: Vec<&str> = records
        .iter()
        .map(|record| record.event.status.as_str())
        .collect();
    let messages: Vec<String> = records.iter().map(|record| words(&record.event)).collect();
    let times: Vec<OffsetDateTime> = records.iter().map(|record| record.at).collect();
    let partitions: Vec<i32> = records.iter().map(|record| record.source.0).collect();
    let offsets: Vec<i64> = records.iter().map(|record| record.source.1).collect();
    let parents: Vec<Option<&str>> = records
        .iter()
        .map(|record| record.traceparent.as_deref())
        .collect();
    // both unique indexes count, so the conflict names none
    let rows = sqlx::query!(
        r#"
        INSERT INTO notifications.message
            (user_id, order_id, sequence, status, message, created_at,
             source_topic, source_partition, source_offset, traceparent, next_attempt_at)
        SELECT user_id, order_id, sequence, status, message, created_at, $1, partition, "offset", traceparent,
               GREATEST(now(), (
                   SELECT lowest.next_attempt_at FROM notifications.message AS lowest
                   WHERE lowest.order_id = given.order_id AND COALESCE(lowest.told_at, lowest.given_up_at) IS NULL
                   ORDER BY lowest.sequence, lowest.id
                   LIMIT 1))
        FROM UNNEST($2::bigint[], $3::bigint[], $4::integer[], $5::text[], $6::text[], $7::timestamptz[],
                    $8::integer[], $9::bigint[], $10::text[])
            WITH ORDINALITY AS given (user_id, order_id, sequence, status, message, created_at,
                                      partition, "offset", traceparent, place)
        ORDER BY place
        ON CONFLICT DO NOTHING
        RETURNING source_partition, source_offset
        "#,
        topic,
        &users,
        &orders,
        &sequences,
        &statuses as &[&str],
        &messages,
        &times,
        &partitions,
        &offsets,
        &parents as &[Option<&str>],
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (row.source_partition, row.source_offset))
        .collect())
}

/// Finds the rows that `records` met, each with the place (from 0) of its record: by order and sequence or, where an event has none, by its place in Kafka.
/// A statement of its own, after the insert: only then does it see what another transaction just committed. Each row is
/// looked up by itself, which LIMIT 1 keeps from becoming a join: one that compares every record with every row of a topic
/// without sequences, until the table is analyzed (seen: 11 s instead of 2 ms).
pub async fn find_saved(
    connection: &mut Db,
    topic: &str,
    records: &[&Received],
) -> Result<Vec<(usize, Stored)>, sqlx::Error> {
    let orders: Vec<i64> = records
        .iter()
        .map(|record| record.event.order.get())
        .collect();
    let sequences: Vec<i32> = records.iter().map(|record| record.event.sequence).collect();
    let partitions: Vec<i32> = records.iter().map(|record| record.source.0).collect();
    let offsets: Vec<i64> = records.iter().map(|record| record.source.1).collect();
    let rows = sqlx::query!(
        r#"
        WITH given AS (
            SELECT order_id, sequence, partition, "offset", place
            FROM UNNEST($2::bigint[], $3::integer[], $4::integer[], $5::bigint[])
                WITH ORDINALITY AS given (order_id, sequence, partition, "offset", place)
        )
        SELECT given.place AS "place!", m.user_id AS "user_id!", m.status AS "status!", m.message AS "message!",
               m.created_at AS "created_at!"
        FROM given
        CROSS JOIN LATERAL (
            SELECT m.user_id, m.status, m.message, m.created_at FROM notifications.message AS m
            WHERE m.order_id = given.order_id AND m.sequence = given.sequence AND m.sequence > 0
            LIMIT 1) AS m
        UNION ALL
        SELECT given.place, m.user_id, m.status, m.message, m.created_at
        FROM given
        CROSS JOIN LATERAL (
            SELECT m.user_id, m.status, m.message, m.created_at FROM notifications.message AS m
            WHERE m.source_topic = $1 AND m.source_partition = given.partition AND m.source_offset = given."offset"
              AND m.sequence = 0
            LIMIT 1) AS m
        WHERE given.sequence = 0
        "#,
        topic,
        &orders,
        &sequences,
        &partitions,
        &offsets,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let stored = Stored {
                user: row.user_id,
                status: row.status,
                message: row.message,
                at: row.created_at,
            };
            (usize::try_from(row.place - 1).unwrap_or_default(), stored)
        })
        .collect())
}

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
              ORDER BY lowest.sequence, lowest.id
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
