//! The gRPC door: reads the request, asks the use case, writes the reply.

use platform::{error::Violation, pg::Pool};
use proto::notifications::{
    Date, GetHistoryWithPeriodRequest, GetHistoryWithPeriodResponse, Message,
    notifications_server::Notifications,
};
use tonic::{Request, Response, Status};

use crate::{
    error::Error,
    event::UserId,
    history::{self, Day, Query},
    message::Told,
};

/// `notifications.Notifications`.
#[derive(Clone)]
pub struct Service {
    /// The database of messages.
    pub pool: Pool,
}

#[tonic::async_trait]
impl Notifications for Service {
    async fn get_history_with_period(
        &self,
        request: Request<GetHistoryWithPeriodRequest>,
    ) -> Result<Response<GetHistoryWithPeriodResponse>, Status> {
        let query = Query::try_from(request.into_inner()).map_err(Error::Invalid)?;
        tracing::Span::current().record("user.id", query.user.get());
        let history = history::get(&self.pool, &query).await?;
        let user = query.user;
        Ok(Response::new(GetHistoryWithPeriodResponse {
            messages: history
                .messages
                .into_iter()
                .map(|told| message(user, told))
                .collect(),
            next_page_token: history.next_page_token,
        }))
    }
}

impl TryFrom<GetHistoryWithPeriodRequest> for Query {
    type Error = Vec<Violation>;

    fn try_from(request: GetHistoryWithPeriodRequest) -> Result<Query, Vec<Violation>> {
        let day = |date: Date| Day {
            year: date.year,
            month: date.month,
            day: date.day,
        };
        Query::parse(
            request.user,
            request.from.map(day),
            request.to.map(day),
            request.page_size,
            &request.page_token,
        )
    }
}

fn message(user: UserId, told: Told) -> Message {
    let micros = told.position.micros;
    Message {
        order_id: told.position.order,
        user_id: user.get(),
        status: told.status,
        message: told.message,
        created_at: Some(pbjson_types::Timestamp {
            seconds: micros.div_euclid(1_000_000),
            // below 1000 million by the remainder
            nanos: (micros.rem_euclid(1_000_000) * 1_000) as i32,
        }),
    }
}
