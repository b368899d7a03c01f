//! Bytes to tokens, one byte at a time, with QEMU's leniency and its way back after an error.

/// What a token is; the text of those that carry one stays in the [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    OpenBrace,
    CloseBrace,
    OpenBracket,
    CloseBracket,
    Colon,
    Comma,
    Integer,
    Float,
    Keyword,
    String,
    /// Bytes that begin no token; the text ends with the offending byte.
    Stray,
}

/// One token as it stood in the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) text: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    /// After a stray byte: everything up to a control character (but not a tab), a
    /// structural character, 0xFE or 0xFF is dropped.
    Recovery,
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
    Quoted(u8),
    Escape(u8),
}

/// What a byte does to a state.
enum Step {
    /// The byte belongs to the token that is being read.
    Take(State),
    /// The byte completes the token.
    Finish(Kind),
    /// The token ended before this byte.
    FinishBefore(Kind),
    /// The byte fits nowhere.
    Stray,
    /// The byte separates tokens or is dropped.
    Skip(State),
    /// Recovery ends before this byte.
    Restart,
}

/// The lexer: a state and the bytes of the unfinished token.
#[derive(Debug, Default)]
pub(super) struct Lexer {
    state: State,
    text: Vec<u8>,
}

impl Lexer {
    /// Takes one byte; up to two tokens come out of it (a number and the brace that ended it).
    pub(super) fn feed(&mut self, byte: u8, mut emit: impl FnMut(Token)) {
        loop {
            match step(self.state, byte) {
                Step::Take(state) => {
                    self.text.push(byte);
                    self.state = state;
                }
                Step::Finish(kind) => {
                    self.text.push(byte);
                    emit(self.finish(kind, State::Start));
                }
                Step::FinishBefore(kind) => {
                    emit(self.finish(kind, State::Start));
                    continue;
                }
                Step::Stray => {
                    self.text.push(byte);
                    emit(self.finish(Kind::Stray, State::Recovery));
                }
                Step::Skip(state) => self.state = state,
                Step::Restart => {
                    self.state = State::Start;
                    continue;
                }
            }
            return;
        }
    }

    /// The input has ended: completes a number or keyword, reports anything else unfinished as stray.
    pub(super) fn end(&mut self, mut emit: impl FnMut(Token)) {
        match step(self.state, b'\n') {
            Step::FinishBefore(kind) => emit(self.finish(kind, State::Start)),
            _ if self.text.is_empty() => self.state = State::Start,
            _ => emit(self.finish(Kind::Stray, State::Start)),
        }
    }

    /// Length of the unfinished token, in bytes.
    pub(super) fn pending(&self) -> usize {
        self.text.len()
    }

    /// Forgets the unfinished token and skips to where a new one may begin.
    pub(super) fn abandon(&mut self) {
        self.text.clear();
        self.state = State::Recovery;
    }

    fn finish(&mut self, kind: Kind, next: State) -> Token {
        self.state = next;
        Token {
            kind,
            text: std::mem::take(&mut self.text),
        }
    }
}

fn step(state: State, byte: u8) -> Step {
    use State::{
        Digits, Escape, Exponent, ExponentDigits, ExponentSign, Fraction, Keyword, Minus, Point,
        Quoted, Recovery, Start, Zero,
    };
    match (state, byte) {
        (Start, _) => start(byte),
        (Recovery, b'\t') => Step::Skip(Recovery),
        (Recovery, 0..=0x1f | 0xfe..=0xff | b'{' | b'}' | b'[' | b']' | b':' | b',') => {
            Step::Restart
        }
        (Recovery, _) => Step::Skip(Recovery),

        (Minus, b'0') => Step::Take(Zero),
        (Minus, b'1'..=b'9') => Step::Take(Digits),
        (Zero, b'0'..=b'9') => Step::Stray,
        (Digits, b'0'..=b'9') => Step::Take(Digits),
        (Zero | Digits, b'.') => Step::Take(Point),
        (Zero | Digits | Fraction, b'e' | b'E') => Step::Take(Exponent),
        (Point | Fraction, b'0'..=b'9') => Step::Take(Fraction),
        (Exponent, b'+' | b'-') => Step::Take(ExponentSign),
        (Exponent | ExponentSign | ExponentDigits, b'0'..=b'9') => Step::Take(ExponentDigits),
        (Zero | Digits, _) => Step::FinishBefore(Kind::Integer),
        (Fraction | ExponentDigits, _) => Step::FinishBefore(Kind::Float),
        (Minus | Point | Exponent | ExponentSign, _) => Step::Stray,

        (Keyword, b'a'..=b'z') => Step::Take(Keyword),
        (Keyword, _) => Step::FinishBefore(Kind::Keyword),

        (Escape(_) | Quoted(_), 0..=0x1f | 0xfe..=0xff) => Step::Stray,
        (Escape(quote), _) => Step::Take(Quoted(quote)),
        (Quoted(quote), b'\\') => Step::Take(Escape(quote)),
        (Quoted(quote), byte) if byte == quote => Step::Finish(Kind::String),
        (Quoted(quote), _) => Step::Take(Quoted(quote)),
    }
}

fn start(byte: u8) -> Step {
    match byte {
        b' ' | b'\t' | b'\r' | b'\n' => Step::Skip(State::Start),
        b'{' => Step::Finish(Kind::OpenBrace),
        b'}' => Step::Finish(Kind::CloseBrace),
        b'[' => Step::Finish(Kind::OpenBracket),
        b']' => Step::Finish(Kind::CloseBracket),
        b':' => Step::Finish(Kind::Colon),
        b',' => Step::Finish(Kind::Comma),
        b'"' | b'\'' => Step::Take(State::Quoted(byte)),
        b'-' => Step::Take(State::Minus),
        b'0' => Step::Take(State::Zero),
        b'1'..=b'9' => Step::Take(State::Digits),
        b'a'..=b'z' => Step::Take(State::Keyword),
        _ => Step::Stray,
    }
}
