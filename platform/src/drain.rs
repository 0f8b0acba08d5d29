//! What a stop waits for. An answer that has its headers is not sent yet: its body may wait for a slow reader, in hyper's
//! hands or in a connection's buffer, and is in progress until its last byte is the kernel's to deliver.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::tls::Connection;

/// A body that holds something until it has ended, or its reader has gone.
pub(crate) struct Held<B, T> {
    body: B,
    _held: T,
}

impl<B, T> Held<B, T> {
    pub(crate) fn new(body: B, held: T) -> Held<B, T> {
        Held { body, _held: held }
    }
}

impl<B: Body + Unpin, T: Unpin> Body for Held<B, T> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// As much as one frame of HTTP/2 carries.
const PIECE: usize = 16 * 1024;

/// The body of a gRPC answer, a long message of it in pieces. hyper hands a piece over when its stream may send a byte at
/// least; it would hand over a whole message likewise, and end the body while its reader has room for little of it.
pub(crate) struct Pieces<B> {
    body: B,
    rest: Bytes,
}

impl<B> Pieces<B> {
    pub(crate) fn of(body: B) -> Pieces<B> {
        Pieces {
            body,
            rest: Bytes::new(),
        }
    }

    /// The last byte goes by itself: there is room for it only when there is room for all that precedes it.
    fn piece(&mut self) -> Bytes {
        let length = match self.rest.len() {
            0 | 1 => self.rest.len(),
            rest => PIECE.min(rest - 1),
        };
        self.rest.split_to(length)
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Pieces<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(self.piece()))));
        }
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            ended => return Poll::Ready(ended),
        };
        let frame = match frame.into_data() {
            Ok(data) if data.len() > PIECE => {
                self.rest = data;
                Frame::data(self.piece())
            }
            Ok(data) => Frame::data(data),
            Err(trailers) => trailers,
        };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }
}

/// What a connection's last answer holds while bytes of it are in the connection's buffer.
#[derive(Clone, Default)]
pub(crate) struct Unsent(Arc<Mutex<Option<TaskTrackerToken>>>);

impl Unsent {
    fn set(&self, token: Option<TaskTrackerToken>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }
}

/// Held by an answer over HTTP/1, and left to its connection when the body has ended.
pub(crate) struct Answering {
    token: Option<TaskTrackerToken>,
    unsent: Unsent,
}

impl Answering {
    pub(crate) fn new(token: TaskTrackerToken, unsent: Unsent) -> Answering {
        Answering {
            token: Some(token),
            unsent,
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.unsent.set(self.token.take());
    }
}

/// The socket of an HTTP/1 connection. hyper flushes it when its own buffer is empty, and only then.
pub(crate) struct Socket {
    stream: Connection,
    unsent: Unsent,
}

impl Socket {
    pub(crate) fn new(stream: Connection, unsent: Unsent) -> Socket {
        Socket { stream, unsent }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if flushed.is_ready() {
            self.unsent.set(None);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::{Request, Response};
    use http_body_util::{BodyExt as _, Full};
    use tower::Service as _;

    use super::*;
    use crate::{config::Limits, grpc::Guard, roles::Policy};

    #[tokio::test]
    async fn a_call_is_in_progress_to_the_last_byte_of_its_answer() {
        let guard = Guard::new("answering", &Limits::default(), Policy::new(&[], None));
        let mut service = guard.wrap(tower::service_fn(|_: Request<tonic::body::Body>| {
            let body = tonic::body::Body::new(Full::new(Bytes::from_static(b"answer")));
            std::future::ready(Ok::<_, Infallible>(Response::new(body)))
        }));
        let answer = service
            .call(Request::new(tonic::body::Body::empty()))
            .await
            .unwrap();
        let mut idle = Box::pin(guard.idle());
        assert!(futures::poll!(&mut idle).is_pending());
        drop(answer);
        idle.await;
    }

    async fn lengths(message: usize) -> Vec<usize> {
        let mut body = Pieces::of(Full::new(Bytes::from(vec![7_u8; message])));
        let mut lengths = Vec::new();
        while let Some(frame) = body.frame().await {
            lengths.push(frame.unwrap().into_data().unwrap().len());
        }
        assert!(body.is_end_stream());
        lengths
    }

    #[tokio::test]
    async fn a_long_message_ends_with_a_byte_of_its_own() {
        assert_eq!(lengths(100).await, [100]);
        assert_eq!(lengths(PIECE).await, [PIECE]);
        assert_eq!(lengths(PIECE + 1).await, [PIECE, 1]);
        assert_eq!(lengths(2 * PIECE + 9).await, [PIECE, PIECE, 8, 1]);
    }
}
