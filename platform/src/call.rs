//! The call that a task works for: which peer has made it, and the place that it holds among the
//! calls in progress. Work that a call hands to a task goes on when its caller leaves; it keeps the
//! place until it has ended, or callers that leave at once would begin any amount of it.

use std::{future::Future, sync::Arc};

use crate::{admission::Part, peer::PeerId};

tokio::task_local! {
    static CURRENT: Call;
}

#[derive(Clone)]
pub(crate) struct Call {
    peer: PeerId,
    _place: Option<Arc<Part>>,
}

impl Call {
    pub(crate) fn new(peer: PeerId, place: Part) -> Call {
        Call {
            peer,
            _place: Some(Arc::new(place)),
        }
    }

    /// The call that this task works for.
    fn current() -> Call {
        CURRENT.try_with(Call::clone).unwrap_or(Call {
            peer: PeerId::NONE,
            _place: None,
        })
    }

    /// The peer whose call this task works for.
    pub(crate) fn peer() -> PeerId {
        CURRENT.try_with(|call| call.peer).unwrap_or(PeerId::NONE)
    }

    /// Work for this call.
    pub(crate) fn scope<F: Future>(self, work: F) -> impl Future<Output = F::Output> {
        CURRENT.scope(self, work)
    }

    /// Work that the current call began and that ends it.
    pub(crate) fn carried<F: Future>(work: F) -> impl Future<Output = F::Output> {
        Call::current().scope(work)
    }

    /// Work that the current call began and that outlasts it: the same peer, and no place.
    pub(crate) fn followed<F: Future>(work: F) -> impl Future<Output = F::Output> {
        let call = Call {
            peer: Call::peer(),
            _place: None,
        };
        call.scope(work)
    }
}
