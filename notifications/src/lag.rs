//! How far the partitions of a consumer are behind, asked of the broker again and again.

use std::{sync::Arc, time::Duration};

use rdkafka::consumer::{Consumer as _, StreamConsumer};
use tokio_util::sync::CancellationToken;

use crate::assignment::Assignment;

/// As often as Prometheus asks.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long the broker may take for an answer; stopping waits for it.
const BROKER_BOUND: Duration = Duration::from_secs(1);

/// Keeps the lag on show until the consumer ends.
pub(crate) async fn watch(consumer: Arc<StreamConsumer<Assignment>>, ended: CancellationToken) {
    loop {
        let (measured, until) = (consumer.clone(), ended.clone());
        // librdkafka's questions block
        let measure = move || {
            let context = measured.context();
            context.measure(&*measured, BROKER_BOUND, &until)
        };
        if let Ok(Err(error)) = tokio::task::spawn_blocking(measure).await {
            tracing::debug!(error = %error, "lag not measured");
        }
        tokio::select! {
            () = ended.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}
