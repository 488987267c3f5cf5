//! A gate in front of a real server: it wants credentials, sends downloads elsewhere, and keeps a log.
//!
//! What passes it is answered by the server behind. Downloads that match are redirected to a second listener, the CDN,
//! which wants a signature and serves the same bytes; tokens that arrive there stand in the log.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::header::{AUTHORIZATION, HOST, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use tokio::net::TcpStream;

use crate::faults::Faults;
use crate::lie::Kind as LieKind;
use crate::log::{Log, Place, Seen};
use crate::serve::{Answer, Dropped, Server, answer, bind, lock, serve};

/// What a gate wants to be shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Demand {
    /// Nothing.
    #[default]
    Nothing,
    /// Exactly this `Authorization` header.
    Exactly(String),
    /// A token that the gate itself hands out at `/token`: to everybody, or for this user and password.
    Token(Option<(String, String)>),
}

/// A running gate with its CDN; both end when it is dropped.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    front: Server,
    cdn: Server,
}

#[derive(Debug)]
struct Shared {
    behind: SocketAddr,
    /// Requests pass as they came, signed host and credentials among them.
    is_transparent: bool,
    rules: Mutex<Rules>,
    lies: Faults<LieKind>,
    lies_told: AtomicU64,
    /// Bytes of endless answers that were sent.
    endless_bytes: Arc<AtomicU64>,
    log: Log,
}

#[derive(Debug, Default)]
struct Rules {
    demand: Demand,
    /// Where the challenge says that tokens are; the gate's own place unless set.
    realm: Option<String>,
    /// Requests that a token is good for.
    uses: usize,
    tokens: HashMap<String, usize>,
    issued: usize,
    /// Downloads whose path has this in it are redirected.
    redirected: Option<String>,
    /// Redirects that the CDN's addresses are good for before they are spent.
    spent_after: Option<usize>,
    signatures: HashMap<String, usize>,
}

impl Gate {
    /// A gate that lets everybody pass to the server at `behind`.
    pub fn start(behind: SocketAddr) -> anyhow::Result<Self> {
        Self::start_before(behind, false)
    }

    /// A gate whose server gets every request as it came, with the host and credentials that may be signed.
    pub fn transparent(behind: SocketAddr) -> anyhow::Result<Self> {
        Self::start_before(behind, true)
    }

    fn start_before(behind: SocketAddr, is_transparent: bool) -> anyhow::Result<Self> {
        let rules = Mutex::new(Rules { uses: usize::MAX, ..Rules::default() });
        let shared = Arc::new(Shared {
            behind,
            is_transparent,
            rules,
            lies: Faults::default(),
            lies_told: AtomicU64::new(0),
            endless_bytes: Arc::default(),
            log: Log::default(),
        });
        let (front, cdn) = (bind("127.0.0.1:0")?, bind("127.0.0.2:0").or_else(|_| bind("127.0.0.1:0"))?);
        let (front_addr, cdn_addr) = (front.1, cdn.1);
        let front = serve(front, {
            let shared = shared.clone();
            move |request| at_the_front(shared.clone(), front_addr, cdn_addr, request)
        });
        let cdn = serve(cdn, {
            let shared = shared.clone();
            move |request| at_the_cdn(shared.clone(), request)
        });
        Ok(Self { shared, front, cdn })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.front.addr()
    }

    /// Its address, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// The lies that are told; see [`Lie`](crate::Lie) for what there is.
    pub fn lies(&self) -> &Faults<LieKind> {
        &self.shared.lies
    }

    /// Bytes of endless answers that connections took.
    pub fn endless_bytes(&self) -> u64 {
        self.shared.endless_bytes.load(Ordering::SeqCst)
    }

    /// What is wanted from now on.
    pub fn demand(&self, demand: Demand) {
        lock(&self.shared.rules).demand = demand;
    }

    /// Names another place for tokens.
    pub fn realm(&self, realm: &str) {
        lock(&self.shared.rules).realm = Some(realm.to_owned());
    }

    /// Each token is good for this many requests.
    pub fn token_uses(&self, uses: usize) {
        lock(&self.shared.rules).uses = uses;
    }

    /// GETs whose path contains `part` are answered from the CDN.
    pub fn redirect(&self, part: &str) {
        lock(&self.shared.rules).redirected = Some(part.to_owned());
    }

    /// Each address at the CDN is good for this many requests.
    pub fn spent_after(&self, requests: usize) {
        lock(&self.shared.rules).spent_after = Some(requests);
    }

    /// While down, every connection is closed without an answer.
    pub fn down(&self, down: bool) {
        self.front.set_down(down);
        self.cdn.set_down(down);
    }

    /// Everything asked so far. The gate counts as [`Place::Hub`].
    pub fn requests(&self) -> Vec<Seen> {
        self.shared.log.all()
    }

    /// Forgets what was asked.
    pub fn clear_requests(&self) {
        self.shared.log.clear();
    }
}

async fn at_the_front(
    shared: Arc<Shared>,
    front: SocketAddr,
    cdn: SocketAddr,
    request: Request<Incoming>,
) -> Result<Answer, Dropped> {
    let mut seen = Seen::of(Place::Hub, &request);
    let decided = shared.decide(front, cdn, &request);
    let answer = match decided {
        Some(answer) => Ok(answer),
        None => forward_or_lie(&shared, request).await,
    };
    seen.status = answer.as_ref().map_or(0, |answer| answer.status().as_u16());
    shared.log.push(seen);
    answer
}

async fn at_the_cdn(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Answer, Dropped> {
    let mut seen = Seen::of(Place::Cdn, &request);
    let answer = match shared.signature_holds(request.uri().query().unwrap_or_default()) {
        true => forward(&shared, request).await,
        false => Ok(refuse(StatusCode::FORBIDDEN, "spent")),
    };
    seen.status = answer.as_ref().map_or(0, |answer| answer.status().as_u16());
    shared.log.push(seen);
    answer
}

impl Shared {
    /// The gate's own answer, unless the request passes.
    fn decide(&self, front: SocketAddr, cdn: SocketAddr, request: &Request<Incoming>) -> Option<Answer> {
        let mut rules = lock(&self.rules);
        let shown = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if request.uri().path() == "/token" {
            return Some(rules.token(shown));
        }
        if !rules.satisfied(shown) {
            return Some(rules.challenge(front));
        }
        let path = request.uri().path();
        let part = rules.redirected.clone()?;
        (request.method() == hyper::Method::GET && path.contains(&part)).then(|| {
            let signature = format!("canary-signature-{}", rules.signatures.len());
            let good_for = rules.spent_after.unwrap_or(usize::MAX);
            rules.signatures.insert(signature.clone(), good_for);
            let mut answer = refuse(StatusCode::TEMPORARY_REDIRECT, "");
            let place = format!("http://{cdn}{path}?signature={signature}");
            answer.headers_mut().insert(LOCATION, HeaderValue::from_str(&place).expect("an address"));
            answer
        })
    }

    fn signature_holds(&self, query: &str) -> bool {
        let mut rules = lock(&self.rules);
        match query.strip_prefix("signature=").and_then(|signature| rules.signatures.get_mut(signature)) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

impl Rules {
    fn satisfied(&mut self, shown: &str) -> bool {
        match &self.demand {
            Demand::Nothing => true,
            Demand::Exactly(wanted) => shown == wanted,
            Demand::Token(_) => match shown.strip_prefix("Bearer ").and_then(|token| self.tokens.get_mut(token)) {
                Some(left) if *left > 0 => {
                    *left -= 1;
                    true
                }
                _ => false,
            },
        }
    }

    fn challenge(&self, front: SocketAddr) -> Answer {
        let mut answer =
            refuse(StatusCode::UNAUTHORIZED, "{\"errors\":[{\"code\":\"UNAUTHORIZED\",\"message\":\"who?\"}]}");
        let realm = self.realm.clone().unwrap_or_else(|| format!("http://{front}/token"));
        let challenge = match &self.demand {
            Demand::Token(_) => {
                format!("Bearer realm=\"{realm}\",service=\"testkit\",scope=\"repository:x:pull,push\"")
            }
            _ => "Basic realm=\"testkit\"".to_owned(),
        };
        answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_str(&challenge).expect("a challenge"));
        answer
    }

    fn token(&mut self, shown: &str) -> Answer {
        let Demand::Token(login) = &self.demand else { return refuse(StatusCode::NOT_FOUND, "no tokens here") };
        let wanted = login.as_ref().map(|(user, password)| {
            let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
            format!("Basic {pair}")
        });
        if wanted.is_some_and(|wanted| wanted != shown) {
            return refuse(StatusCode::UNAUTHORIZED, "{\"details\":\"wrong\"}");
        }
        self.issued += 1;
        let token = format!("canary-token-{}", self.issued);
        self.tokens.insert(token.clone(), self.uses);
        answer(StatusCode::OK, "application/json", format!("{{\"token\":\"{token}\",\"expires_in\":300}}"))
    }
}

fn refuse(status: StatusCode, body: &'static str) -> Answer {
    answer(status, "application/json", body)
}

/// The honest answer, a spoiled one, or another one.
async fn forward_or_lie(shared: &Shared, request: Request<Incoming>) -> Result<Answer, Dropped> {
    let path = percent_decode_str(request.uri().path()).decode_utf8_lossy().into_owned();
    let subject = format!("{path}?{}", request.uri().query().unwrap_or_default());
    let method = request.method().to_string();
    let number = shared.lies_told.fetch_add(1, Ordering::SeqCst);
    if let Some(lie) = shared.lies.strike(&method, &subject, |lie| !lie.spoils()) {
        return lie.answer(number, &shared.endless_bytes).ok_or(Dropped);
    }
    let answer = forward(shared, request).await?;
    if !answer.status().is_success()
        || method != "GET"
        || answer.body().size_hint().exact().is_some_and(|size| size < 2)
    {
        return Ok(answer);
    }
    match shared.lies.strike(&method, &subject, LieKind::spoils) {
        Some(lie) => lie.spoiled(answer).await,
        None => Ok(answer),
    }
}

/// The answer of the server behind, which gets no credentials unless the gate is transparent.
async fn forward(shared: &Shared, request: Request<Incoming>) -> Result<Answer, Dropped> {
    let (behind, (mut head, body)) = (shared.behind, request.into_parts());
    if !shared.is_transparent {
        head.headers.remove(AUTHORIZATION);
        head.headers.insert(HOST, HeaderValue::from_str(&behind.to_string()).map_err(|_| Dropped)?);
    }
    let body: Bytes = body.collect().await.map_err(|_| Dropped)?.to_bytes();
    let stream = TcpStream::connect(behind).await.map_err(|_| Dropped)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|_| Dropped)?;
    tokio::spawn(async move { drop(connection.await) });
    let response = sender.send_request(Request::from_parts(head, Full::new(body))).await.map_err(|_| Dropped)?;
    let (head, body) = response.into_parts();
    Ok(Response::from_parts(head, body.map_err(Into::into).boxed_unsync()))
}
