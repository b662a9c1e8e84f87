//! Who has a slot: first come, first served, a slot refilled as soon as it is free. No tensor here.

use std::collections::{HashMap, VecDeque};

use echelon_core::rollout::Prompts;

use crate::sequence::{Member, Running};

/// Sequences that begin with the same tokens, and so share the pass over them.
#[derive(Debug)]
pub struct Group {
    token_ids: Vec<i64>,
    waiting: VecDeque<Member>,
    prefilled: bool,
}

impl Group {
    /// The sequences of a call by distinct prompt, in the order in which prompts first appear.
    pub fn of(prompts: &Prompts) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        let mut by_tokens: HashMap<&[i64], usize> = HashMap::new();
        for (prompt_index, prompt) in prompts.rows.iter().enumerate() {
            let index = *by_tokens.entry(&prompt.token_ids).or_insert(groups.len());
            if index == groups.len() {
                groups.push(Group { token_ids: prompt.token_ids.clone(), waiting: VecDeque::new(), prefilled: false });
            }
            groups[index].waiting.extend((0..prompts.samples_per_prompt).map(|sample| Member { prompt_index, sample }));
        }
        groups
    }

    /// Tokens of the prompt.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences that wait for a slot.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }
}

/// Sequences of one group that get slots now.
#[derive(Debug, PartialEq)]
pub struct Admission {
    /// The prompt's tokens when they go through the model now; None when they did before.
    pub prefill: Option<Vec<i64>>,
    /// The slots, one for each of `members`.
    pub slots: Vec<usize>,
    pub members: Vec<Member>,
    /// Others of the group still wait: the prompt's keys and values must be kept for them.
    pub others_wait: bool,
}

/// The waiting groups and the slots. At most one group, the first, is partly admitted.
#[derive(Debug)]
pub struct Scheduler {
    waiting: VecDeque<Group>,
    slots: Vec<Option<Running>>,
    max_batched_tokens: usize,
}

impl Scheduler {
    pub fn new(groups: Vec<Group>, num_slots: usize, max_batched_tokens: usize) -> Scheduler {
        let slots = std::iter::repeat_with(|| None).take(num_slots).collect();
        Scheduler { waiting: groups.into(), slots, max_batched_tokens }
    }

    /// Hands free slots to waiting sequences, until slots, sequences or tokens for one pass run out. The caller occupies
    /// every slot it is given.
    pub fn admit(&mut self) -> Vec<Admission> {
        let mut free: VecDeque<usize> = (0..self.slots.len()).filter(|&slot| self.slots[slot].is_none()).collect();
        let mut admissions = Vec::new();
        let mut batched = 0;
        while let Some(group) = self.waiting.front_mut().filter(|_| !free.is_empty()) {
            let tokens = if group.prefilled { 0 } else { group.num_tokens() };
            if batched > 0 && batched + tokens > self.max_batched_tokens {
                break;
            }
            batched += tokens;
            let count = group.waiting.len().min(free.len());
            let prefill = (!group.prefilled).then(|| group.token_ids.clone());
            group.prefilled = true;
            let members = group.waiting.drain(..count).collect();
            let others_wait = !group.waiting.is_empty();
            admissions.push(Admission { prefill, slots: free.drain(..count).collect(), members, others_wait });
            if !others_wait {
                self.waiting.pop_front();
            }
        }
        admissions
    }

    /// Tokens and prompts of the first pass over prompts.
    pub fn first_pass(mut self) -> (usize, usize) {
        let prompts: Vec<usize> = self.admit().iter().filter_map(|a| a.prefill.as_ref().map(Vec::len)).collect();
        (prompts.iter().sum(), prompts.len())
    }

    /// Sequences wait for a slot.
    pub fn some_wait(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub fn occupy(&mut self, slot: usize, sequence: Running) {
        let before = self.slots[slot].replace(sequence);
        assert!(before.is_none(), "slot {slot} was free");
    }

    /// Frees a slot.
    pub fn release(&mut self, slot: usize) -> Running {
        self.slots[slot].take().expect("a live slot")
    }

    /// Moves live sequences into the first slots; the moves as (from, to), in order.
    pub fn compact(&mut self) -> Vec<(usize, usize)> {
        let mut moves = Vec::new();
        for to in 0..self.num_live() {
            if self.slots[to].is_none() {
                let from = self.slots.iter().rposition(Option::is_some).expect("as many live slots as counted");
                self.slots.swap(from, to);
                moves.push((from, to));
            }
        }
        moves
    }

    pub fn num_live(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    pub fn sequence(&self, slot: usize) -> &Running {
        self.slots[slot].as_ref().expect("a live slot")
    }

    pub fn sequence_mut(&mut self, slot: usize) -> &mut Running {
        self.slots[slot].as_mut().expect("a live slot")
    }
}

#[cfg(test)]
mod tests {
    use echelon_core::random::{Domain, uniform};
    use echelon_core::rollout::{FinishReason, Prompt, SamplingConfig};

    use super::*;
    use crate::sampler::Drawn;
    use crate::sequence::EndConditions;

    fn prompts(token_ids: &[&[i64]], samples_per_prompt: usize) -> Prompts {
        let row = |(id, ids): (usize, &&[i64])| Prompt {
            id: id as u64,
            token_ids: ids.to_vec(),
            text: String::new(),
            label: None,
        };
        Prompts {
            rows: token_ids.iter().enumerate().map(row).collect(),
            samples_per_prompt,
            seed: 0,
            evaluation: false,
        }
    }

    fn endless() -> SamplingConfig {
        let max_new_tokens = usize::MAX;
        SamplingConfig {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_new_tokens,
            stop: vec![],
            ignore_eos: false,
        }
    }

    fn occupy(scheduler: &mut Scheduler, admissions: &[Admission], ends: &EndConditions) {
        for (slot, member) in admissions.iter().flat_map(|a| a.slots.iter().zip(&a.members)) {
            scheduler.occupy(*slot, Running::new(*member, 1, ends));
        }
    }

    #[test]
    fn equal_prompts_are_one_group() {
        let groups = Group::of(&prompts(&[&[1, 2], &[3], &[1, 2]], 2));
        assert_eq!(groups.iter().map(Group::num_tokens).collect::<Vec<_>>(), [2, 1]);
        assert_eq!(groups.iter().map(Group::num_waiting).collect::<Vec<_>>(), [4, 2]);
        assert_eq!(groups[0].waiting[2], Member { prompt_index: 2, sample: 0 });
    }

    #[test]
    fn a_group_goes_through_the_model_once_however_its_samples_get_slots() {
        let sampling = endless();
        let ends = EndConditions::new(&sampling, None).unwrap();
        let mut scheduler = Scheduler::new(Group::of(&prompts(&[&[1, 2], &[3]], 3)), 2, 100);
        let first = scheduler.admit();
        assert_eq!((first.len(), first[0].prefill.clone(), first[0].others_wait), (1, Some(vec![1, 2]), true));
        occupy(&mut scheduler, &first, &ends);
        assert!(scheduler.admit().is_empty());
        scheduler.release(0);
        scheduler.release(1);
        let second = scheduler.admit();
        assert_eq!((second[0].prefill.clone(), second[0].others_wait, second[0].slots.clone()), (None, false, vec![0]));
        assert_eq!(
            (second[1].prefill.clone(), second[1].others_wait, second[1].slots.clone()),
            (Some(vec![3]), true, vec![1])
        );
    }

    #[test]
    fn a_pass_holds_max_batched_tokens_and_a_longer_prompt_goes_alone() {
        let sampling = endless();
        let ends = EndConditions::new(&sampling, None).unwrap();
        let mut scheduler = Scheduler::new(Group::of(&prompts(&[&[1; 3], &[2; 3], &[3; 9], &[4]], 1)), 8, 6);
        let mut passes = Vec::new();
        loop {
            let admissions = scheduler.admit();
            if admissions.is_empty() {
                break;
            }
            occupy(&mut scheduler, &admissions, &ends);
            passes.push(admissions.iter().map(|a| a.prefill.as_ref().unwrap().len()).collect::<Vec<_>>());
        }
        assert_eq!(passes, [vec![3, 3], vec![9], vec![1]]);
    }

    /// Every live sequence gains a token a step; a released slot is taken again before the next step.
    #[test]
    fn slots_never_idle_while_sequences_wait() {
        let sampling = endless();
        let ends = EndConditions::new(&sampling, None).unwrap();
        for (num_slots, seed) in [(1, 1), (4, 2), (16, 3), (200, 4)] {
            let lengths: Vec<usize> =
                (0..100).map(|i| 8 + (uniform(seed, Domain::Data, i, 0, 0) * 249.0) as usize).collect();
            let tokens: Vec<Vec<i64>> = (0..100).map(|i| vec![i]).collect();
            let tokens: Vec<&[i64]> = tokens.iter().map(Vec::as_slice).collect();
            let mut scheduler = Scheduler::new(Group::of(&prompts(&tokens, 1)), num_slots, 1 << 20);
            let mut steps = 0;
            loop {
                let admissions = scheduler.admit();
                occupy(&mut scheduler, &admissions, &ends);
                scheduler.compact();
                let live = scheduler.num_live();
                if live == 0 {
                    break;
                }
                assert!(live == num_slots || scheduler.waiting.is_empty());
                for slot in 0..live {
                    let sequence = scheduler.sequence_mut(slot);
                    assert_ne!(
                        sequence.push(Drawn { token: 5, logprob: 0.0 }, &ends).unwrap(),
                        Some(FinishReason::Stop)
                    );
                    if sequence.num_generated() == lengths[sequence.member().prompt_index] {
                        scheduler.release(slot);
                    }
                }
                steps += 1;
            }
            let bound = lengths.iter().sum::<usize>() / num_slots + lengths.iter().max().unwrap();
            assert!(steps <= bound && steps >= *lengths.iter().max().unwrap(), "{steps} steps, bound {bound}");
        }
    }

    #[test]
    fn compacting_moves_the_last_into_the_holes() {
        let sampling = endless();
        let ends = EndConditions::new(&sampling, None).unwrap();
        let mut scheduler = Scheduler::new(Group::of(&prompts(&[&[1]], 5)), 5, 100);
        let admissions = scheduler.admit();
        occupy(&mut scheduler, &admissions, &ends);
        for slot in [0, 2, 4] {
            scheduler.release(slot);
        }
        assert_eq!(scheduler.compact(), [(3, 0)]);
        let samples: Vec<usize> = (0..2).map(|slot| scheduler.sequence(slot).member().sample).collect();
        assert_eq!(samples, [3, 1]);
    }
}
