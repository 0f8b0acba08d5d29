//! Records that could not be saved: kept, taken to their topic, put back, and in the end deleted.

use platform::pg::Db;
use time::OffsetDateTime;

use crate::{
    event::Source,
    letter::{Identity, KeptLetter, Letter, Place, headers},
};

/// Columns of identities, as UNNEST takes them.
struct Columns<'a> {
    clusters: Vec<&'a str>,
    topics: Vec<&'a str>,
    partitions: Vec<i32>,
    offsets: Vec<i64>,
    millis: Vec<i64>,
    hashes: Vec<&'a [u8]>,
}

impl Columns<'_> {
    fn of(identities: &[Identity]) -> Columns<'_> {
        let places = || identities.iter().map(|identity| &identity.place);
        Columns {
            clusters: identities.iter().map(|of| of.cluster.as_str()).collect(),
            topics: places().map(|place| place.topic.as_str()).collect(),
            partitions: places().map(|place| place.partition).collect(),
            offsets: places().map(|place| place.offset).collect(),
            millis: identities.iter().map(|of| of.millis).collect(),
            hashes: identities.iter().map(|of| of.sha256.as_slice()).collect(),
        }
    }
}

/// What waits to be taken to the topic.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backlog {
    /// Rows.
    pub rows: i64,
    /// Of their keys, values and headers.
    pub bytes: i64,
}

/// How much that is.
pub async fn measure_unmoved(connection: &mut Db) -> Result<Backlog, sqlx::Error> {
    sqlx::query_as!(
        Backlog,
        r#"
        SELECT count(*) AS "rows!", COALESCE(sum(bytes), 0)::bigint AS "bytes!"
        FROM notifications.dead_letter WHERE moved_at IS NULL
        "#,
    )
    .fetch_one(connection)
    .await
}

/// Keeps what is not kept yet, and answers which that was.
pub async fn insert_dead_letters(
    connection: &mut Db,
    cluster: &str,
    letters: &[Letter],
) -> Result<Vec<Source>, sqlx::Error> {
    let identities: Vec<Identity> = letters
        .iter()
        .map(|letter| letter.identity(cluster))
        .collect();
    let columns = Columns::of(&identities);
    let keys: Vec<Option<&[u8]>> = letters.iter().map(Letter::key).collect();
    let values: Vec<Option<&[u8]>> = letters.iter().map(Letter::value).collect();
    let headers: Vec<Vec<u8>> = letters.iter().map(Letter::headers).collect();
    let sizes: Vec<i64> = letters.iter().map(Letter::size).collect();
    let causes: Vec<&str> = letters.iter().map(|letter| letter.cause.as_str()).collect();
    let errors: Vec<&str> = letters.iter().map(|letter| letter.error.as_str()).collect();
    let rows = sqlx::query!(
        r#"
        INSERT INTO notifications.dead_letter
            (cluster_id, topic, partition, "offset", record_millis, value_sha256, key, value, headers, bytes, cause, error)
        SELECT $1, topic, partition, "offset", record_millis, value_sha256, key, value, headers, bytes, cause, error
        FROM UNNEST($2::text[], $3::integer[], $4::bigint[], $5::bigint[], $6::bytea[], $7::bytea[], $8::bytea[],
                    $9::bytea[], $10::bigint[], $11::text[], $12::text[])
            WITH ORDINALITY AS given (topic, partition, "offset", record_millis, value_sha256, key, value, headers, bytes,
                                      cause, error, nth)
        ORDER BY nth
        ON CONFLICT (cluster_id, topic, partition, "offset", record_millis, value_sha256) DO NOTHING
        RETURNING partition, "offset"
        "#,
        cluster,
        &columns.topics as &[&str],
        &columns.partitions,
        &columns.offsets,
        &columns.millis,
        &columns.hashes as &[&[u8]],
        &keys as &[Option<&[u8]>],
        &values as &[Option<&[u8]>],
        &headers,
        &sizes,
        &causes as &[&str],
        &errors as &[&str],
    )
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (row.partition, row.offset))
        .collect())
}

/// The columns of a [`KeptLetter`].
struct Row {
    id: i64,
    cluster_id: String,
    topic: String,
    partition: i32,
    offset: i64,
    record_millis: i64,
    value_sha256: Vec<u8>,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Vec<u8>,
    cause: String,
    error: String,
    dead_at: OffsetDateTime,
}

impl From<Row> for KeptLetter {
    fn from(row: Row) -> KeptLetter {
        KeptLetter {
            id: row.id,
            identity: Identity {
                cluster: row.cluster_id,
                place: Place {
                    topic: row.topic,
                    partition: row.partition,
                    offset: row.offset,
                },
                millis: row.record_millis,
                // of that length by a constraint
                sha256: row.value_sha256.try_into().unwrap_or_default(),
            },
            key: row.key,
            value: row.value,
            headers: headers::decode(&row.headers),
            cause: row.cause,
            error: row.error,
            dead_at: row.dead_at,
        }
    }
}

/// The oldest first.
fn letters(rows: Vec<Row>) -> Vec<KeptLetter> {
    let mut letters: Vec<KeptLetter> = rows.into_iter().map(KeptLetter::from).collect();
    letters.sort_by_key(|letter| letter.id);
    letters
}

/// Takes the oldest of what waits for the topic, for so many seconds; what another replica has is
/// passed over.
pub async fn claim_unmoved(
    connection: &mut Db,
    seconds: f64,
    limit: i64,
) -> Result<Vec<KeptLetter>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"
        UPDATE notifications.dead_letter SET claimed_until = now() + make_interval(secs => $1)
        WHERE id = ANY (ARRAY (
            SELECT id FROM notifications.dead_letter
            WHERE moved_at IS NULL AND claimed_until <= now()
            ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED))
        RETURNING id, cluster_id, topic, partition, "offset", record_millis, value_sha256, key, value, headers, cause, error,
                  dead_at
        "#,
        seconds,
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(letters(rows))
}

/// Notes that the topic has them.
pub async fn mark_moved(connection: &mut Db, ids: &[i64]) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE notifications.dead_letter SET moved_at = COALESCE(moved_at, now()) WHERE id = ANY($1)",
        ids,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Lets others take them again.
pub async fn release_unmoved(connection: &mut Db, ids: &[i64]) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE notifications.dead_letter SET claimed_until = 'epoch' WHERE id = ANY($1)",
        ids,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// The newest row there is, or 0.
pub async fn last_row(connection: &mut Db) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(r#"SELECT COALESCE(max(id), 0) AS "last!" FROM notifications.dead_letter"#)
        .fetch_one(connection)
        .await
}

/// Takes the oldest of what waits to be put back, up to row `last`, for so many seconds.
pub async fn claim_to_put_back(
    connection: &mut Db,
    seconds: f64,
    last: i64,
    limit: i64,
) -> Result<Vec<KeptLetter>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"
        UPDATE notifications.dead_letter SET put_back_until = now() + make_interval(secs => $1)
        WHERE id = ANY (ARRAY (
            SELECT id FROM notifications.dead_letter
            WHERE put_back_at IS NULL AND put_back_until <= now() AND id <= $2
            ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED))
        RETURNING id, cluster_id, topic, partition, "offset", record_millis, value_sha256, key, value, headers, cause, error,
                  dead_at
        "#,
        seconds,
        last,
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(letters(rows))
}

/// Notes that they lie where they were read again; the topic needs them no more.
pub async fn mark_put_back(connection: &mut Db, ids: &[i64]) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"
        UPDATE notifications.dead_letter SET put_back_at = now(), moved_at = COALESCE(moved_at, now())
        WHERE id = ANY($1)
        "#,
        ids,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Lets the next replay take them.
pub async fn release_put_back(connection: &mut Db, ids: &[i64]) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE notifications.dead_letter SET put_back_until = 'epoch' WHERE id = ANY($1)",
        ids,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// The next of those that wait to be put back, or of all.
pub async fn list_dead_letters(
    connection: &mut Db,
    all: bool,
    after: i64,
    limit: i64,
) -> Result<Vec<KeptLetter>, sqlx::Error> {
    let rows = sqlx::query_as!(
        Row,
        r#"
        SELECT id, cluster_id, topic, partition, "offset", record_millis, value_sha256, key, value, headers, cause, error,
               dead_at
        FROM notifications.dead_letter
        WHERE id > $1 AND ($2 OR put_back_at IS NULL)
        ORDER BY id LIMIT $3
        "#,
        after,
        all,
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(letters(rows))
}

/// The row of a letter that lies in the topic.
#[derive(Clone, Copy, Debug)]
pub struct RowOf {
    /// Its row.
    pub id: i64,
    /// It waits no more.
    pub put_back: bool,
}

/// The rows of letters, each with the place (from 0) of its letter.
pub async fn find_rows(
    connection: &mut Db,
    identities: &[Identity],
) -> Result<Vec<(usize, RowOf)>, sqlx::Error> {
    let columns = Columns::of(identities);
    let rows = sqlx::query!(
        r#"
        SELECT given.nth AS "nth!", letter.id, letter.put_back_at IS NOT NULL AS "put_back!"
        FROM UNNEST($1::text[], $2::text[], $3::integer[], $4::bigint[], $5::bigint[], $6::bytea[])
            WITH ORDINALITY AS given (cluster_id, topic, partition, "offset", record_millis, value_sha256, nth)
        JOIN notifications.dead_letter AS letter
            USING (cluster_id, topic, partition, "offset", record_millis, value_sha256)
        "#,
        &columns.clusters as &[&str],
        &columns.topics as &[&str],
        &columns.partitions,
        &columns.offsets,
        &columns.millis,
        &columns.hashes as &[&[u8]],
    )
    .fetch_all(connection)
    .await?;
    let found = rows.into_iter().map(|row| {
        let (id, put_back) = (row.id, row.put_back);
        let nth = usize::try_from(row.nth - 1).unwrap_or_default();
        (nth, RowOf { id, put_back })
    });
    Ok(found.collect())
}

/// Deletes some of those that the topic has had for so long; answers how many.
pub async fn delete_moved(
    connection: &mut Db,
    seconds: f64,
    limit: i64,
) -> Result<u64, sqlx::Error> {
    let deleted = sqlx::query!(
        r#"
        DELETE FROM notifications.dead_letter WHERE id = ANY (ARRAY (
            SELECT id FROM notifications.dead_letter
            WHERE moved_at <= now() - make_interval(secs => $1)
            ORDER BY moved_at LIMIT $2 FOR UPDATE SKIP LOCKED))
        "#,
        seconds,
        limit,
    )
    .execute(connection)
    .await?;
    Ok(deleted.rows_affected())
}
