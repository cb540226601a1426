//! A classic BPF program under construction.

use std::net::Ipv6Addr;

use crate::host::sys::BpfInstruction;

/// A place in a [`Program`] to jump to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label(usize);

/// A classic BPF program under construction (Documentation/networking/filter.rst); all jumps lead forward.
#[derive(Default)]
pub(super) struct Program {
    code: Vec<Step>,
    places: Vec<usize>,
}

enum Step {
    Plain(BpfInstruction),
    Jump(Label),
}

impl Program {
    pub(super) fn label(&mut self) -> Label {
        self.places.push(0);
        Label(self.places.len() - 1)
    }

    pub(super) fn place(&mut self, label: Label) {
        let here = self.code.len();
        if let Some(place) = self.places.get_mut(label.0) {
            *place = here;
        }
    }

    pub(super) fn push(&mut self, code: u16, k: u32) {
        self.push_jump(code, 0, 0, k);
    }

    fn push_jump(&mut self, code: u16, when_true: u8, when_false: u8, k: u32) {
        self.code.push(Step::Plain(BpfInstruction {
            code,
            when_true,
            when_false,
            k,
        }));
    }

    pub(super) fn load_byte(&mut self, at: u32) {
        self.push(op::LOAD_BYTE, at);
    }

    pub(super) fn jump(&mut self, to: Label) {
        self.code.push(Step::Jump(to));
    }

    pub(super) fn jump_if(&mut self, value: u32, to: Label) {
        self.push_jump(op::JUMP_EQUAL, 0, 1, value);
        self.jump(to);
    }

    pub(super) fn jump_if_at_least(&mut self, value: u32, to: Label) {
        self.push_jump(op::JUMP_AT_LEAST, 0, 1, value);
        self.jump(to);
    }

    pub(super) fn jump_unless(&mut self, value: u32, to: Label) {
        self.push_jump(op::JUMP_EQUAL, 1, 0, value);
        self.jump(to);
    }

    /// Jumps if the address at `at` lies in a prefix.
    pub(super) fn jump_if_prefix(&mut self, at: u32, addr: Ipv6Addr, len: u8, to: Label) {
        let other = self.label();
        let bits = addr.to_bits();
        for (word, offset) in (0u8..4).zip((at..).step_by(4)) {
            let covered = len.saturating_sub(word * 32).min(32);
            if covered == 0 {
                break;
            }
            let mask = u32::MAX << (32 - u32::from(covered));
            let wanted = (bits >> (96 - 32 * u32::from(word))) as u32 & mask;
            self.push(op::LOAD_WORD, offset);
            if mask != u32::MAX {
                self.push(op::AND, mask);
            }
            self.jump_unless(wanted, other);
        }
        self.jump(to);
        self.place(other);
    }

    /// Jumps unless `bytes` follow the place in X.
    pub(super) fn jump_unless_left(&mut self, bytes: u32, to: Label) {
        let (inside, enough) = (self.label(), self.label());
        self.push(op::LOAD_LENGTH, 0);
        self.push_jump(op::JUMP_AT_LEAST_X, 0, 1, 0);
        self.jump(inside);
        self.jump(to);
        self.place(inside);
        self.push(op::SUBTRACT_X, 0);
        self.jump_if_at_least(bytes, enough);
        self.jump(to);
        self.place(enough);
    }

    /// Leaves the exclusive or of words of the inner header in the accumulator.
    pub(super) fn xor_words(&mut self, offsets: &[u32], start: u32, sum: u32) {
        for (nth, &offset) in offsets.iter().enumerate() {
            self.push(op::LOAD_X_MEMORY, start);
            self.push(op::LOAD_WORD_AT_X, offset);
            if nth > 0 {
                self.push(op::LOAD_X_MEMORY, sum);
                self.push(op::XOR_X, 0);
            }
            self.push(op::STORE, sum);
        }
    }

    pub(super) fn modulo(&mut self, n: u32) {
        self.push(op::MODULO, n.max(1));
    }

    pub(super) fn accept(&mut self) {
        self.push(op::RETURN, u32::MAX);
    }

    pub(super) fn reject(&mut self) {
        self.push(op::RETURN, 0);
    }

    pub(super) fn assemble(self) -> Vec<BpfInstruction> {
        let places = self.places;
        let distance = |from: usize, to: Label| {
            let place = places.get(to.0).copied().unwrap_or(0);
            u32::try_from(place.saturating_sub(from + 1)).unwrap_or(0)
        };
        let steps = self.code.into_iter().enumerate();
        steps
            .map(|(at, step)| match step {
                Step::Plain(instruction) => instruction,
                Step::Jump(to) => BpfInstruction {
                    code: op::JUMP,
                    when_true: 0,
                    when_false: 0,
                    k: distance(at, to),
                },
            })
            .collect()
    }
}

pub(super) mod op {
    //! Operations of linux/filter.h and linux/bpf_common.h, each with its operands' kinds.
    pub(in crate::host::raw) const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    pub(in crate::host::raw) const LOAD_LENGTH: u16 = 0x80; // BPF_LD | BPF_W | BPF_LEN
    pub(in crate::host::raw) const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
    pub(in crate::host::raw) const LOAD_WORD_AT_X: u16 = 0x40; // BPF_LD | BPF_W | BPF_IND
    pub(in crate::host::raw) const LOAD_BYTE_AT_X: u16 = 0x50; // BPF_LD | BPF_B | BPF_IND
    pub(in crate::host::raw) const LOAD: u16 = 0x00; // BPF_LD | BPF_IMM
    pub(in crate::host::raw) const LOAD_MEMORY: u16 = 0x60; // BPF_LD | BPF_MEM
    pub(in crate::host::raw) const LOAD_X: u16 = 0x01; // BPF_LDX | BPF_IMM
    pub(in crate::host::raw) const LOAD_X_MEMORY: u16 = 0x61; // BPF_LDX | BPF_MEM
    pub(in crate::host::raw) const STORE: u16 = 0x02; // BPF_ST
    pub(in crate::host::raw) const STORE_X: u16 = 0x03; // BPF_STX
    pub(in crate::host::raw) const A_TO_X: u16 = 0x07; // BPF_MISC | BPF_TAX
    pub(in crate::host::raw) const XOR_X: u16 = 0xac; // BPF_ALU | BPF_XOR | BPF_X
    pub(in crate::host::raw) const ADD: u16 = 0x04; // BPF_ALU | BPF_ADD
    pub(in crate::host::raw) const ADD_X: u16 = 0x0c; // BPF_ALU | BPF_ADD | BPF_X
    pub(in crate::host::raw) const SUBTRACT_X: u16 = 0x1c; // BPF_ALU | BPF_SUB | BPF_X
    pub(in crate::host::raw) const MULTIPLY: u16 = 0x24; // BPF_ALU | BPF_MUL
    pub(in crate::host::raw) const AND: u16 = 0x54; // BPF_ALU | BPF_AND
    pub(in crate::host::raw) const SHIFT_RIGHT: u16 = 0x74; // BPF_ALU | BPF_RSH
    pub(in crate::host::raw) const MODULO: u16 = 0x94; // BPF_ALU | BPF_MOD
    pub(in crate::host::raw) const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
    pub(in crate::host::raw) const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ
    pub(in crate::host::raw) const JUMP_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE
    pub(in crate::host::raw) const JUMP_AT_LEAST_X: u16 = 0x3d; // BPF_JMP | BPF_JGE | BPF_X
    pub(in crate::host::raw) const RETURN: u16 = 0x06; // BPF_RET
}
