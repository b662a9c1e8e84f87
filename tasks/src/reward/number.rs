//! Numbers in prose and LaTeX, as exact fractions.
//!
//! Read: signs (also `−`), currency in front, thousands separators (`1,234`, `1{,}234`, `1\,234`), decimals, exponents
//! (`1e5`), fractions (`3/4`, `\frac{3}{4}`, `\frac34`), mixed numbers (`1 3/4`, `1\frac{3}{4}`), percent. A minus
//! after a letter, a digit or a closing bracket is subtraction, not a sign. Numbers of more than 30 digits are
//! passed over: no answer has them, and fractions stay exact in 128 bits.

/// A number as it stands in a text: a fraction in lowest terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number {
    numerator: i128,
    /// Above 0.
    denominator: i128,
    /// Whether a percent sign follows; the fraction is the number before it.
    pub(super) percent: bool,
}

/// All numbers of `text`, in order.
pub(super) fn numbers(text: &str) -> Vec<Number> {
    let text = text.replace("{,}", ",").replace("\\,", ",").replace("\\!", "").replace('−', "-");
    let mut scanner = Scanner { bytes: text.as_bytes(), at: 0 };
    let mut found = Vec::new();
    while scanner.at < scanner.bytes.len() {
        let start = scanner.at;
        match scanner.number() {
            Some(number) => found.extend(number),
            None => scanner.at = start + 1,
        }
    }
    found
}

impl Number {
    /// Whether both are the same number. Where only one has a percent sign, `50%` equals both `50` and `0.5`:
    /// data sets disagree about writing the sign.
    ///
    /// Exact, unless `tolerance` is above 0: then a difference up to `tolerance` times the other's size passes.
    pub(super) fn equals(&self, label: &Self, tolerance: f64) -> bool {
        if self.close(label, tolerance) {
            return true;
        }
        match (self.percent, label.percent) {
            (true, false) => self.hundredth().is_some_and(|number| number.close(label, tolerance)),
            (false, true) => label.hundredth().is_some_and(|label| self.close(&label, tolerance)),
            _ => false,
        }
    }

    fn close(&self, label: &Self, tolerance: f64) -> bool {
        let same = (self.numerator, self.denominator) == (label.numerator, label.denominator);
        same || (tolerance > 0.0 && (self.value() - label.value()).abs() <= tolerance * label.value().abs())
    }

    fn value(&self) -> f64 {
        self.numerator as f64 / self.denominator as f64
    }

    fn hundredth(&self) -> Option<Self> {
        Self::new(self.numerator, self.denominator.checked_mul(100)?)
    }

    /// The fraction in lowest terms; none for a denominator of 0.
    fn new(numerator: i128, denominator: i128) -> Option<Self> {
        if denominator == 0 {
            return None;
        }
        let divisor = greatest_common_divisor(numerator.unsigned_abs(), denominator.unsigned_abs()) as i128;
        let sign = denominator.signum();
        Some(Self { numerator: sign * numerator / divisor, denominator: sign * denominator / divisor, percent: false })
    }

    fn divided_by(&self, other: &Self) -> Option<Self> {
        let numerator = self.numerator.checked_mul(other.denominator)?;
        Self::new(numerator, self.denominator.checked_mul(other.numerator)?)
    }

    fn plus(&self, other: &Self) -> Option<Self> {
        let left = self.numerator.checked_mul(other.denominator)?;
        let right = other.numerator.checked_mul(self.denominator)?;
        Self::new(left.checked_add(right)?, self.denominator.checked_mul(other.denominator)?)
    }

    fn is_whole(&self) -> bool {
        self.denominator == 1
    }
}

fn greatest_common_divisor(a: u128, b: u128) -> u128 {
    if b == 0 { a.max(1) } else { greatest_common_divisor(b, a % b) }
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Scanner<'_> {
    /// The number that starts here. None: no number starts here. `Some(None)`: a number that has no value
    /// (a division by 0, too many digits) was passed over.
    fn number(&mut self) -> Option<Option<Number>> {
        let before_currency = self.sign();
        let negative = if self.currency() { before_currency | self.sign() } else { before_currency };
        let value = match self.fraction_command() {
            Some(value) => value,
            None => self.plain_or_mixed()?,
        };
        let percent = self.percent();
        Some(value.map(|value| Number {
            numerator: if negative { -value.numerator } else { value.numerator },
            percent,
            ..value
        }))
    }

    fn sign(&mut self) -> bool {
        let binary = self.at > 0 && {
            let before = self.bytes[self.at - 1];
            before.is_ascii_alphanumeric() || matches!(before, b')' | b']' | b'}')
        };
        let sign = self.bytes.get(self.at).filter(|sign| matches!(sign, b'-' | b'+'));
        self.at += usize::from(sign.is_some());
        sign == Some(&b'-') && !binary
    }

    /// Passes over a currency sign and the spaces after it; whether there was one.
    fn currency(&mut self) -> bool {
        let signs = ["\\$", "$", "€", "£", "¥"];
        let Some(sign) = signs.iter().find(|sign| self.starts_with(sign)) else {
            return false;
        };
        self.at += sign.len();
        self.at += self.bytes[self.at..].iter().take_while(|byte| **byte == b' ').count();
        true
    }

    fn starts_with(&self, prefix: &str) -> bool {
        self.bytes[self.at..].starts_with(prefix.as_bytes())
    }

    /// `\frac{a}{b}`, `\dfrac`, `\tfrac`, `\frac12`.
    fn fraction_command(&mut self) -> Option<Option<Number>> {
        let start = self.at;
        let name = ["\\frac", "\\dfrac", "\\tfrac"].into_iter().find(|name| self.starts_with(name))?;
        self.at += name.len();
        let parts = self.fraction_argument().and_then(|above| Some((above, self.fraction_argument()?)));
        if parts.is_none() {
            self.at = start;
        }
        let (above, below) = parts?;
        Some(above.divided_by(&below))
    }

    /// One argument of `\frac`: a number in braces or a single digit.
    fn fraction_argument(&mut self) -> Option<Number> {
        self.at += self.bytes[self.at..].iter().take_while(|byte| **byte == b' ').count();
        if self.bytes.get(self.at) != Some(&b'{') {
            let digit = self.bytes.get(self.at).filter(|byte| byte.is_ascii_digit())?;
            self.at += 1;
            return Number::new(i128::from(digit - b'0'), 1);
        }
        let length = self.bytes[self.at..].iter().position(|&byte| byte == b'}')?;
        let inner = std::str::from_utf8(&self.bytes[self.at + 1..self.at + length]).ok()?.trim();
        self.at += length + 1;
        let mut scanner = Scanner { bytes: inner.as_bytes(), at: 0 };
        let number = scanner.number()??;
        (scanner.at == inner.len()).then_some(number)
    }

    /// `12`, `1,234.5`, `3/4`, `1 3/4`, `1\frac{3}{4}`.
    fn plain_or_mixed(&mut self) -> Option<Option<Number>> {
        let first = self.decimal()?;
        if let Some(below) = self.after_slash() {
            return Some(first.zip(below).and_then(|(above, below)| above.divided_by(&below)));
        }
        let end = self.at;
        let whole = first.filter(Number::is_whole);
        if let (Some(whole), Some(part)) = (whole, self.mixed_part()) {
            return Some(whole.plus(&part));
        }
        self.at = end;
        Some(first)
    }

    fn after_slash(&mut self) -> Option<Option<Number>> {
        let start = self.at;
        if self.bytes.get(self.at) != Some(&b'/') {
            return None;
        }
        self.at += 1;
        let below = self.decimal();
        if below.is_none() {
            self.at = start;
        }
        below
    }

    /// The fraction of a mixed number: below 1, after at most one space.
    fn mixed_part(&mut self) -> Option<Number> {
        let spaced = self.bytes.get(self.at) == Some(&b' ');
        self.at += usize::from(spaced);
        let part = match self.fraction_command() {
            Some(part) => part?,
            None if spaced => {
                let above = self.decimal()??;
                above.divided_by(&self.after_slash()??)?
            }
            None => return None,
        };
        (part.numerator > 0 && part.numerator < part.denominator).then_some(part)
    }

    /// Digits with separators, decimals and exponent, without sign. None: no digit here. `Some(None)`: too long.
    fn decimal(&mut self) -> Option<Option<Number>> {
        let continues = self.at > 0 && self.bytes[self.at - 1].is_ascii_digit();
        let mut digits = self.whole_digits();
        let point = self.bytes.get(self.at) == Some(&b'.') && !(digits.is_empty() && continues);
        let mut num_decimals = 0;
        if point && self.bytes.get(self.at + 1).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
            let decimals = self.digit_run();
            num_decimals = decimals.len();
            digits.extend(decimals);
        }
        if digits.is_empty() {
            return None;
        }
        let exponent = self.exponent() - num_decimals as i64;
        Some(from_digits(&digits, exponent))
    }

    fn whole_digits(&mut self) -> Vec<u8> {
        let mut digits = self.digit_run();
        if (1..=3).contains(&digits.len()) {
            while self.bytes.get(self.at) == Some(&b',') && self.digits_from(self.at + 1) == 3 {
                self.at += 1;
                digits.extend(self.digit_run());
            }
        }
        digits
    }

    fn digit_run(&mut self) -> Vec<u8> {
        let length = self.digits_from(self.at);
        self.at += length;
        self.bytes[self.at - length..self.at].to_vec()
    }

    fn digits_from(&self, at: usize) -> usize {
        self.bytes.get(at..).unwrap_or_default().iter().take_while(|byte| byte.is_ascii_digit()).count()
    }

    /// `e5` or `E-3` when nothing wordlike follows; else 0.
    fn exponent(&mut self) -> i64 {
        if !matches!(self.bytes.get(self.at), Some(b'e' | b'E')) {
            return 0;
        }
        let signed = matches!(self.bytes.get(self.at + 1), Some(b'-' | b'+'));
        let start = self.at + 1 + usize::from(signed);
        let end = start + self.digits_from(start);
        let wordlike = self.bytes.get(end).is_some_and(u8::is_ascii_alphanumeric);
        if end == start || end - start > 4 || wordlike {
            return 0;
        }
        let text = std::str::from_utf8(&self.bytes[self.at + 1..end]).unwrap_or_default();
        self.at = end;
        text.parse().unwrap_or(0)
    }

    fn percent(&mut self) -> bool {
        let rest = &self.bytes[self.at..];
        let rest = rest.strip_prefix(b" ").unwrap_or(rest);
        let unescaped = rest.strip_prefix(b"\\").unwrap_or(rest);
        let found = unescaped.first() == Some(&b'%');
        if found {
            self.at = self.bytes.len() - unescaped.len() + 1;
        }
        found
    }
}

fn from_digits(digits: &[u8], exponent: i64) -> Option<Number> {
    const MAX_DIGITS: usize = 30;
    let leading_zeros = digits.iter().take_while(|&&digit| digit == b'0').count();
    let digits = &digits[leading_zeros..];
    if digits.len() > MAX_DIGITS || exponent.unsigned_abs() > MAX_DIGITS as u64 {
        return None;
    }
    let mantissa = digits.iter().fold(0_i128, |sum, digit| sum * 10 + i128::from(digit - b'0'));
    let power = 10_i128.pow(exponent.unsigned_abs() as u32);
    if exponent < 0 { Number::new(mantissa, power) } else { Number::new(mantissa.checked_mul(power)?, 1) }
}
