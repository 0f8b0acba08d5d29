//! Where the reading of partitions began.

use platform::pg::Db;

use crate::starts::{Chosen, Recorded};

/// What is written down about the partitions of a topic.
pub async fn find_starts(
    connection: &mut Db,
    cluster: &str,
    topic: &str,
    partitions: &[i32],
) -> Result<Vec<(i32, Recorded)>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"
        SELECT partition, "offset", begun_at IS NOT NULL AS "begun!"
        FROM notifications.topic_start
        WHERE cluster_id = $1 AND topic = $2 AND partition = ANY($3)
        "#,
        cluster,
        topic,
        partitions,
    )
    .fetch_all(connection)
    .await?;
    let recorded = rows.into_iter().map(|row| {
        let (offset, begun) = (row.offset, row.begun);
        (row.partition, Recorded { offset, begun })
    });
    Ok(recorded.collect())
}

/// Writes down where reading begins; what is there already stays.
pub async fn insert_starts(
    connection: &mut Db,
    cluster: &str,
    topic: &str,
    chosen: &[Chosen],
) -> Result<(), sqlx::Error> {
    let partitions: Vec<i32> = chosen.iter().map(|chosen| chosen.partition).collect();
    let offsets: Vec<i64> = chosen.iter().map(|chosen| chosen.offset).collect();
    let by: Vec<&str> = chosen.iter().map(|chosen| chosen.by.as_str()).collect();
    sqlx::query!(
        r#"
        INSERT INTO notifications.topic_start (cluster_id, topic, partition, "offset", chosen_by)
        SELECT $1, $2, partition, "offset", chosen_by
        FROM UNNEST($3::integer[], $4::bigint[], $5::text[]) AS given (partition, "offset", chosen_by)
        ORDER BY partition
        ON CONFLICT (cluster_id, topic, partition) DO NOTHING
        "#,
        cluster,
        topic,
        &partitions,
        &offsets,
        &by as &[&str],
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Notes that Kafka has the offsets: from now on a missing one was lost.
pub async fn mark_begun(
    connection: &mut Db,
    cluster: &str,
    topic: &str,
    partitions: &[i32],
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"
        UPDATE notifications.topic_start SET begun_at = now()
        WHERE cluster_id = $1 AND topic = $2 AND partition = ANY($3) AND begun_at IS NULL
        "#,
        cluster,
        topic,
        partitions,
    )
    .execute(connection)
    .await?;
    Ok(())
}
