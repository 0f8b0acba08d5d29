//! How events become messages: what the table knows of them, and the rows that are new.

use platform::pg::Db;
use time::OffsetDateTime;

use crate::{
    event::{Received, Source},
    known::{Known, Stored},
    message::words,
};

/// A transaction that looks up every row by an index. A plan made while the table fits into a few
/// pages would read all of it, for each record, and is kept while the table grows (until it is
/// analyzed).
pub const BEGIN_SAVING: &str = "BEGIN; SET LOCAL enable_seqscan = off";

/// Columns of records, as UNNEST takes them.
struct Columns<'a> {
    users: Vec<i64>,
    orders: Vec<i64>,
    sequences: Vec<i32>,
    statuses: Vec<&'a str>,
    partitions: Vec<i32>,
    offsets: Vec<i64>,
}

impl Columns<'_> {
    fn of<'a>(records: &[&'a Received]) -> Columns<'a> {
        let events = || records.iter().map(|record| &record.event);
        let sources = || records.iter().map(|record| record.source);
        Columns {
            users: events().map(|event| event.user.get()).collect(),
            orders: events().map(|event| event.order.get()).collect(),
            sequences: events().map(|event| event.sequence).collect(),
            statuses: events().map(|event| event.status.as_str()).collect(),
            partitions: sources().map(|(partition, _)| partition).collect(),
            offsets: sources().map(|(_, offset)| offset).collect(),
        }
    }
}

/// Saves what no row stands in the way of, and answers which that was; within [`BEGIN_SAVING`].
/// `records` must be in the order (order, place): two replicas that save the same events then wait
/// for each other instead of deadlocking. What an order has untold may wait after a failure: its
/// next event waits with it, see [`super::postpone`].
pub async fn insert_messages(
    connection: &mut Db,
    topic: &str,
    records: &[&Received],
) -> Result<Vec<Source>, sqlx::Error> {
    let columns = Columns::of(records);
    let messages: Vec<String> = records.iter().map(|record| words(&record.event)).collect();
    let times: Vec<OffsetDateTime> = records.iter().map(|record| record.at).collect();
    let parents: Vec<Option<&str>> = records
        .iter()
        .map(|record| record.traceparent.as_deref())
        .collect();
    // every unique index counts, so the conflict names none
    let rows = sqlx::query!(
        r#"
        INSERT INTO notifications.message
            (user_id, order_id, sequence, status, message, created_at,
             source_topic, source_partition, source_offset, traceparent, next_attempt_at, superseded)
        SELECT user_id, order_id, sequence, status, message, created_at, $1, partition, "offset", traceparent,
               GREATEST(now(), (
                   SELECT lowest.next_attempt_at FROM notifications.message AS lowest
                   WHERE lowest.order_id = given.order_id AND COALESCE(lowest.told_at, lowest.given_up_at) IS NULL
                   ORDER BY notifications.place(lowest.sequence, lowest.status), lowest.id
                   LIMIT 1)), false
        FROM UNNEST($2::bigint[], $3::bigint[], $4::integer[], $5::text[], $6::text[], $7::timestamptz[],
                    $8::integer[], $9::bigint[], $10::text[])
            WITH ORDINALITY AS given (user_id, order_id, sequence, status, message, created_at,
                                      partition, "offset", traceparent, nth)
        ORDER BY nth
        ON CONFLICT DO NOTHING
        RETURNING source_partition, source_offset
        "#,
        topic,
        &columns.users,
        &columns.orders,
        &columns.sequences,
        &columns.statuses as &[&str],
        &messages,
        &times,
        &columns.partitions,
        &columns.offsets,
        &parents as &[Option<&str>],
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (row.source_partition, row.source_offset))
        .collect())
}

/// What the table knows of each record, in their order; each question only if none before it has
/// the answer. Each row is looked up by itself, which LIMIT 1 keeps from becoming a join: one that
/// compares every record with every row, until the table is analyzed (seen: 11 s instead of 2 ms).
/// Of two predicates that are each other's opposite each has its index; a user is compared in a way
/// that no index answers, because that of a user's whole history looks as good while the table is
/// small.
pub async fn find_known(
    connection: &mut Db,
    records: &[&Received],
) -> Result<Vec<Known>, sqlx::Error> {
    let columns = Columns::of(records);
    let rows = sqlx::query!(
        r#"
        SELECT taken.user_id AS "user_id?", taken.status AS "status?", taken.message AS "message?",
               taken.created_at AS "created_at?", same.sequence AS "same?",
               CASE WHEN known.user_id = given.user_id OR same.sequence IS NOT NULL THEN given.user_id
                    WHEN known.user_id IS NOT NULL THEN COALESCE(
                        (SELECT m.user_id FROM notifications.message AS m WHERE m.order_id = given.order_id
                           AND m.superseded IS FALSE AND m.user_id - given.user_id = 0 LIMIT 1),
                        (SELECT m.user_id FROM notifications.message AS m WHERE m.order_id = given.order_id
                           AND m.superseded IS NOT FALSE AND m.user_id - given.user_id = 0 LIMIT 1),
                        known.user_id)
               END AS "owner?"
        FROM UNNEST($1::bigint[], $2::bigint[], $3::integer[], $4::text[])
            WITH ORDINALITY AS given (order_id, user_id, sequence, status, nth)
        LEFT JOIN LATERAL (
            SELECT m.user_id, m.status, m.message, m.created_at FROM notifications.message AS m
            WHERE m.order_id = given.order_id AND m.sequence = given.sequence AND m.sequence > 0
            LIMIT 1) AS taken ON true
        LEFT JOIN LATERAL (
            (SELECT m.user_id FROM notifications.message AS m
             WHERE taken.user_id IS NULL AND m.order_id = given.order_id AND m.superseded IS FALSE LIMIT 1)
            UNION ALL
            (SELECT m.user_id FROM notifications.message AS m
             WHERE taken.user_id IS NULL AND m.order_id = given.order_id AND m.superseded IS NOT FALSE LIMIT 1)
            LIMIT 1) AS known ON true
        LEFT JOIN LATERAL (
            (SELECT m.sequence FROM notifications.message AS m
             WHERE known.user_id IS NOT NULL AND m.order_id = given.order_id AND m.status = given.status
               AND m.superseded IS FALSE AND m.user_id - given.user_id = 0 LIMIT 1)
            UNION ALL
            (SELECT m.sequence FROM notifications.message AS m
             WHERE known.user_id IS NOT NULL AND m.order_id = given.order_id AND m.status = given.status
               AND m.superseded IS NOT FALSE AND m.user_id - given.user_id = 0 LIMIT 1)
            LIMIT 1) AS same ON true
        ORDER BY given.nth
        "#,
        &columns.orders,
        &columns.users,
        &columns.sequences,
        &columns.statuses as &[&str],
    )
    .fetch_all(connection)
    .await?;
    let known = rows.into_iter().map(|row| Known {
        taken: match (row.user_id, row.status, row.message, row.created_at) {
            (Some(user), Some(status), Some(message), Some(at)) => Some(Stored {
                user,
                status,
                message,
                at,
            }),
            _ => None,
        },
        same: row.same,
        owner: row.owner,
    });
    Ok(known.collect())
}

/// Takes the places of `records` from the rows of other events, which lay there before the topic
/// was made anew. By places the release before tells events without a sequence apart: as long as it
/// may run beside, no two have the same.
pub async fn vacate_places(
    connection: &mut Db,
    topic: &str,
    records: &[&Received],
) -> Result<(), sqlx::Error> {
    let columns = Columns::of(records);
    sqlx::query!(
        r#"
        UPDATE notifications.message AS m SET source_offset = -1 - m.id
        WHERE m.id = ANY (ARRAY (
            SELECT (SELECT at_place.id FROM notifications.message AS at_place
                    WHERE at_place.source_topic = $1 AND at_place.source_partition = given.partition
                      AND at_place.source_offset = given."offset" AND at_place.sequence = 0
                      AND (at_place.order_id, at_place.user_id, at_place.status)
                          IS DISTINCT FROM (given.order_id, given.user_id, given.status)
                    LIMIT 1)
            FROM UNNEST($2::integer[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[])
                AS given (partition, "offset", order_id, user_id, status)))
        "#,
        topic,
        &columns.partitions,
        &columns.offsets,
        &columns.orders,
        &columns.users,
        &columns.statuses as &[&str],
    )
    .execute(connection)
    .await?;
    Ok(())
}
